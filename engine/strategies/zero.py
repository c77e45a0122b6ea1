"""DeepSpeed ZeRO: the only file that imports DeepSpeed.

What its engine does under many backwards per step was measured, not assumed, and `tests/test_equivalence.py` pins it:
stages 1 to 3 are exact inside `coalesce_grad_reduction`, stage 0 by holding back the accumulation boundary.
"""

import contextlib
import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.cpp_extension import LIB_EXT, _get_build_directory

from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.process.launcher import is_main_rank
from slidescale.engine.process.substitute import substitute
from slidescale.engine.strategies.state_files import load_state
from slidescale.engine.strategies.strategy import (
    GradientNorms,
    Strategy,
    check_gradient_norm,
    clip_gradients,
    gradient_norms,
)

# DeepSpeed looks for an accelerator when it is imported; this gives it the one that `pick_device` finds.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from deepspeed.utils.tensor_fragment import fragment_address

log = logging.getLogger(__name__)

# What every rank would say alike, the main one says; and DeepSpeed calls functions that PyTorch has renamed.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING if is_main_rank() else logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


# What DeepSpeed's engine calls to reduce at the end of `coalesce_grad_reduction`.
FLUSHES = ("_flush_coalesced_reduction_zero12", "_flush_coalesced_reduction_zero3")
# What its optimizers of stages 1 to 3 call once for each group of parameters, to put the whole norm together: the
# group's norm over all ranks, of gradients that are on the device, or that have been offloaded.
GROUP_NORMS = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")

# What DeepSpeed's checkpoints hold beside tensors and plain values: classes that do nothing but hold numbers.
IN_CHECKPOINTS = (LossScaler, ZeroStageEnum, fragment_address)


class ZeroStrategy(Strategy):
    """DeepSpeed's engine, ZeRO stage 0 to 3 as its configuration says.

    Args:
        ds_config: a complete DeepSpeed configuration (no "auto" left).
        parameter_groups: as torch optimizers take them, none with parameters of both halves of the model.
        optimizer: over these groups, for a configuration that names none.
        scheduler: makes a schedule for an optimizer, for a configuration that names none.
    """

    def __init__(
        self,
        model: SlideModel,
        parameter_groups: list[dict[str, Any]],
        optimizer: Optimizer | None,
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        *,
        ds_config: dict[str, Any],
    ) -> None:
        self._halves = [_half(model, group["params"]) for group in parameter_groups]  # the engine replaces "params"
        with (
            contextlib.redirect_stdout(io.StringIO()),  # where DeepSpeed prints that an operator is built, at each load
            _helpful_errors(),
            _announcing_operators(),
            _without_shared_memory(),
        ):
            engine, _, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=parameter_groups,
                optimizer=optimizer,
                lr_scheduler=scheduler,
                # The slide model runs its own autocast. DeepSpeed's would also round gradients to bf16 to reduce them,
                # on a single rank too (its runtime/torch_autocast.py).
                # And a step's slides are added up inside one of its accumulations.
                config=ds_config | {"torch_autocast": {"enabled": False}, "gradient_accumulation_steps": 1},
                dist_init_required=False,
            )
        self.model = model
        self.device = torch.device(engine.device)
        self._engine = engine
        # In place of DeepSpeed's own, which would run whatever a file names, and of those that ds.json can choose,
        # which write while training goes on: a checkpoint is called complete when `save` returns.
        engine.checkpoint_engine = _Files()
        if engine.load_universal_checkpoint():
            raise ConfigError("ds.json: checkpoint.load_universal is true: take it out, for slidescale writes no such")
        self._stage = int(engine.zero_optimization_stage())
        self.name = f"zero{self._stage}"
        self.checkpoint_format = f"{self.name} on {engine.world_size} ranks"
        if self._stage == 0:
            # Its gradients are clipped here, by a norm that is summed in doubles; DeepSpeed's is not.
            engine.clip_fp32_gradients = lambda: None
        self._group_norms: list[Tensor] = []
        if self._stage > 0:
            for name in GROUP_NORMS:
                setattr(engine.optimizer, name, _noting(getattr(engine.optimizer, name), self._group_norms))
        if self._stage == 3:
            for half in (model.encoder, model.aggregator):
                _gather_on_access(half)

    @contextmanager
    def accumulate(self, backwards: int) -> Iterator[None]:
        """Keep a step's gradients local and reduce them once, at the end."""
        if self._stage > 0:
            try:
                with self._engine.coalesce_grad_reduction():
                    try:
                        yield
                    except BaseException:
                        # On leaving, DeepSpeed would reduce, and wait for ranks that may have met no error.
                        for name in FLUSHES:
                            setattr(self._engine, name, _reduce_nothing)
                        raise
            finally:
                for name in FLUSHES:
                    vars(self._engine).pop(name, None)
            return
        # Stage 0 has no coalescing; withholding the accumulation boundary withholds its reduction.
        self._engine.set_gradient_accumulation_boundary(False)
        yield
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's backward, which its stages 0 to 3 all support; the step weighs its slides itself."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> GradientNorms:
        """DeepSpeed's step: clips by `gradient_clipping`, steps, advances its scheduler, clears the gradients."""
        if self._stage == 0:
            # DeepSpeed computes no norm here, and its gradients are whole and equal on every rank.
            norms = gradient_norms(self.model)
            check_gradient_norm(norms.total)
            if clip := self._engine.gradient_clipping():
                clip_gradients(self.model, norms, clip)
            self._engine.step()
            return norms
        # Stages 1 to 3 skip the update themselves when the norm is not finite, and report it as infinite.
        self._group_norms.clear()
        self._engine.step()
        total = float(self._engine.get_global_grad_norm())
        check_gradient_norm(total)
        return GradientNorms(total, self._norms_by_half())

    def _norms_by_half(self) -> dict[str, float]:
        """Norms of the two halves, from those that DeepSpeed took of its groups.

        Stages 1 and 2 have the optimizer's groups, in their order; stage 3 cuts these into sub-groups of bounded size.
        """
        optimizer = self._engine.optimizer
        count = len(self._halves) if self._stage < 3 else len(optimizer.sub_group_to_group_id)
        assert len(self._group_norms) == count, f"DeepSpeed took {len(self._group_norms)} norms of {count} groups"
        of_group: dict[int, list[float]] = {}
        for index, norm in enumerate(self._group_norms):
            group = index if self._stage < 3 else optimizer.sub_group_to_group_id[index]
            of_group.setdefault(group, []).append(float(norm))
        return {
            half: math.hypot(*(n for group, norms in of_group.items() if self._halves[group] == half for n in norms))
            for half in dict.fromkeys(self._halves)
        }

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's, which DeepSpeed's wrappers of it share."""
        return self._engine.optimizer.param_groups

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Gathered, where stage 3 has split it."""
        if self._stage < 3:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def save(self, folder: Path) -> None:
        """DeepSpeed's sharded checkpoint."""
        self._engine.save_checkpoint(str(folder), tag="state", save_latest=False)

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters; under stage 3 this rank's shards, without what fills up the last of them."""
        for name, parameter in self.model.named_parameters():
            if self._stage < 3:
                yield name, parameter.detach()
                continue
            partition: Any = parameter
            shard, start = partition.ds_tensor, partition.ds_zero_partition_rank * partition.ds_tensor.ds_numel
            yield name, shard.detach().view(-1)[: max(0, partition.ds_numel - start)]

    def load(self, folder: Path) -> None:
        """Read DeepSpeed's sharded checkpoint."""
        self._check_files(folder)
        path, _ = self._engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise UserError(f"{folder} holds no checkpoint that DeepSpeed can read")

    def _check_files(self, folder: Path) -> None:
        """Read all files once, each rank its share, but for the content of tensors.

        Within `load_checkpoint` a rank that finds a file of its own unfit would leave the others waiting.

        Raises:
            UserError: a file holds what `_Files` does not load; on every rank alike.
        """
        found: str | None = None
        for path in sorted(folder.rglob("*.pt"))[dist.get_rank() :: dist.get_world_size()]:
            try:
                load_state(path, "cpu", IN_CHECKPOINTS, mmap=True)
            except UserError as error:
                found = str(error)
        everyones = [found] * dist.get_world_size()
        dist.all_gather_object(everyones, found)
        for text in everyones:
            if text is not None:
                raise UserError(text)


class _Files(TorchCheckpointEngine):
    """Writes and reads the files of DeepSpeed's checkpoints, and loads nothing but tensors and values from them."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, in the form of which tensors need not be read at once."""
        torch.save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file."""
        return load_state(path, map_location, IN_CHECKPOINTS)


def _half(model: SlideModel, parameters: Iterable[nn.Parameter]) -> str:
    """The half of the model that has these parameters, "aggregator" or "encoder"."""
    aggregators = {id(parameter) for parameter in model.aggregator.parameters()}
    halves = {"aggregator" if id(parameter) in aggregators else "encoder" for parameter in parameters}
    assert len(halves) == 1, "a group has parameters of one half of the model"
    return halves.pop()


def _gather_on_access(half: nn.Module) -> None:
    """Let ZeRO-3 gather, during a forward of `half`, parameters that are read without calling the module that has them.

    Its hooks gather a module's own parameters when the module is called. BEiT, EVA-02, SwinV2, MaxViT and others read
    `self.qkv.weight` and never call `self.qkv`. DeepSpeed gathers such a parameter when it is read, and from then on
    with the module that read it, which also gives it back; but only while its containers of parameters are marked,
    which its engine's forward does. A step calls the two halves of the model instead, so each marks its own.
    """

    def mark(on: bool) -> None:
        for module in half.modules():
            module._parameters._in_forward = on  # type: ignore[attr-defined]  # DeepSpeed's ZeROOrderedDict

    half.register_forward_pre_hook(lambda *_: mark(True))
    half.register_forward_hook(lambda *_: mark(False), always_call=True)


def _noting(function: Callable[..., Tensor], notes: list[Tensor]) -> Callable[..., Tensor]:
    """`function`, whose results are also noted."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        notes.append(result := function(*args, **kwargs))
        return result

    return call


def _reduce_nothing(optimizer: object) -> None:
    """Stands in for a reduction that must not take place."""


@contextmanager
def _without_shared_memory() -> Iterator[None]:
    """Make a DeepSpeed backend that does not share memory between a machine's ranks.

    It would for one collective, of tensor-parallel inference, which training never calls. For that it compiles an
    operator for a minute, leaves 66 MiB per rank in /dev/shm when a rank is killed, and waits for ever, deaf to
    signals, for the memory of a rank that has died or is on another machine.
    """
    backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute of its package, this is PyTorch
    with substitute(backend, "build_shm_op", lambda: None):
        yield


@contextmanager
def _helpful_errors() -> Iterator[None]:
    """Say what to change in ds.json where DeepSpeed refuses it only now, or cannot build an operator that it needs."""
    try:
        yield
    except RuntimeError as error:
        if "async_io" in str(error):
            raise UserError(
                "ds.json offloads to NVMe, for which DeepSpeed compiles its async_io operator, and it cannot: install "
                "libaio's headers (Debian and Ubuntu: libaio-dev) and a C++ compiler, or offload to the CPU"
            ) from error
        if "Unable to JIT load" not in str(error):
            raise
        raise UserError(
            f"DeepSpeed cannot compile an operator that ds.json needs: {_one_line(error)}. It takes a C++ compiler and "
            'ninja; for an optimizer, "torch_adam": true among its params takes PyTorch\'s in its place'
        ) from error
    except (ZeRORuntimeException, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"ds.json: DeepSpeed refuses it: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _announcing_operators() -> Iterator[None]:
    """Log a line before DeepSpeed compiles an operator that is not yet in its folder (TORCH_EXTENSIONS_DIR)."""
    original = OpBuilder.jit_load

    def jit_load(self: Any, verbose: bool = True) -> Any:
        folder = Path(_get_build_directory(self.name, verbose=False))
        if not (folder / f"{self.name}{LIB_EXT}").exists():
            log.info("DeepSpeed compiles its %s operator, once: about two minutes, in %s", self.name, folder)
        return original(self, verbose)

    with substitute(OpBuilder, "jit_load", jit_load):
        yield
