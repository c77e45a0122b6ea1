"""Copies of a model whose tensors have shapes and no content, and a group of ranks whose messages go nowhere.

A copy costs no memory, leaves the model as it is, and runs the model's own code: dropout, autocast and activation
checkpointing as they are.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.process.substitute import substitute

# Raised where the model's code looks at values, which fake tensors do not have.
CONTENT_NEEDED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


def meta_copy(model: SlideModel) -> SlideModel:
    """A copy of a model with tensors on the "meta" device.

    Raises:
        ConfigError: the model cannot be copied.
    """
    return _copy(model, lambda tensor: tensor.detach().to("meta"))


@contextmanager
def fake_copy(model: SlideModel, device: str) -> Iterator[SlideModel]:
    """A copy of a model with fake tensors on `device`, which need not exist; what runs in the context is fake as well.

    Args:
        model: with real tensors, or a `meta_copy`.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: the model cannot be copied, or what runs in the context depends on the content of a tensor.
    """
    with ExitStack() as stack:
        if device == "cuda" and not torch.cuda.is_available():
            # autocast turns itself off where there is no GPU; nothing here runs on one.
            stack.enter_context(substitute(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
            stack.enter_context(substitute(torch.cuda, "is_bf16_supported", lambda *_, **__: True))
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def fake(tensor: Tensor) -> Tensor:
            with mode:
                return torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device=fake_device(device)
                )

        copied = _copy(model, fake)
        for parameter in copied.parameters():
            if parameter.requires_grad:
                # As a gradient that is added to those of earlier chunks, each is freed once it is complete.
                parameter.register_post_accumulate_grad_hook(_free_gradient)
        stack.enter_context(mode)
        try:
            yield copied
        except CONTENT_NEEDED as error:
            raise ConfigError(
                "the model's memory cannot be measured without content: what an operator returns depends on the values "
                f"of a tensor ({error}); compute it without looking at values, as masks and torch.where do; "
                "or, in a loop of your own, give make_step a chunk and a policy other than auto"
            ) from error


def fake_device(device: str) -> torch.device:
    """The device of fake tensors."""
    return torch.device("cuda", 0) if device == "cuda" else torch.device(device)


@dataclass(frozen=True)
class FakeGroup(TileGroup):
    """The last rank of a tile group, which has the most tiles, without the others.

    What would arrive from them has its size and no content; collectives allocate what those of `parallel/` do.
    """

    def sum(self, x: Tensor) -> Tensor:
        """As from other ranks."""
        return x.clone()

    def max(self, x: Tensor) -> Tensor:
        """As from other ranks, detached."""
        return x.detach().clone()

    def all_rows(self, rows: Tensor, k: int) -> Tensor:
        """`[K_local, …]` to `[K, …]`."""
        return rows if self.size == 1 else _Gather.apply(rows, k, -(-k // self.size) * self.size)


class _Gather(torch.autograd.Function):
    """Allocates what `collectives.all_gather_rows` does: rows padded to the fullest rank's, theirs, and all K."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, k: int, padded_k: int) -> Tensor:
        ctx.dtype, ctx.rows, ctx.padded_k = rows.dtype, len(rows), padded_k
        padded = rows.new_zeros(len(rows), *rows.shape[1:])
        gathered = padded.new_empty(padded_k, *rows.shape[1:])
        return torch.cat([gathered[:k]])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        padded = gradient.new_zeros(ctx.padded_k, *gradient.shape[1:], dtype=dtype)
        return padded[: ctx.rows].clone().to(ctx.dtype), None, None


def _copy(model: SlideModel, tensor_for: Callable[[Tensor], Tensor]) -> SlideModel:
    """A deep copy with other tensors in the place of parameters, buffers and what else modules hold."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, Tensor):
                memo[id(held)] = tensor_for(held)
    for buffer in model.buffers():
        memo[id(buffer)] = tensor_for(buffer)
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(tensor_for(parameter), requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever an attribute of a module raises: a lock, an open file, a tensor with a graph
        raise ConfigError(
            f"the model cannot be copied, as measuring its memory takes ({type(error).__name__}: {error}): remove "
            "from its modules what copy.deepcopy refuses"
        ) from error


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None
