"""A trial forward when an encoder is made: whether it takes a few tiles without content, and what it returns.

A network that cannot be used is found here in a moment, and not after all slides have been tiled.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from slidescale.engine.errors import ConfigError

# Two numbers, to distinguish a size that follows the number of tiles from one that happens to be its multiple.
COUNTS = (2, 3)
# Under these names timm's networks keep the rates of dropout that their forward computes without a layer.
RATES = ("drop_rate", "attn_drop_rate", "dropout_rate", "drop_prob", "attn_drop", "proj_drop")


def turn_off_dropout(network: nn.Module, *, keep_paths: bool) -> None:
    """Set all of a network's own dropout rates to 0, in place; stochastic depth stays if `keep_paths`.

    timm gives some networks rates of their own (0.2 before the classifier of RexNet and GhostNet, 0.125 in tables of
    relative positions), which are in no setting here and whose masks would not be a tile's own.
    """
    for module in network.modules():
        if isinstance(module, DropPath):
            module.drop_prob = module.drop_prob if keep_paths else 0.0
            continue
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for rate in RATES:
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)


def try_network(network: nn.Module, name: str, tile_px: int, features: Callable[[Tensor], Tensor]) -> int:
    """Send two and three tiles through a copy of a network, whose tensors have no content.

    A network that cannot run so is tried as it is, on blank tiles.

    Args:
        name: the encoder's, for messages.
        features: makes features `[n, D]` of what the network returns.

    Returns:
        D.

    Raises:
        ConfigError: it does not take tiles of this side, never sees their border, does not return one vector per tile,
            draws random numbers that are not a tile's own, or has stochastic depth over something that is not tiles.
    """
    try:
        trials = [_Trial(_without_content(network), n, tile_px, "meta") for n in COUNTS]
    except Exception as error:  # whatever a network raises of a size that it was not made for
        reason: Exception | None = error
        if not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
            try:
                with torch.random.fork_rng(devices=[]):
                    trials = [_Trial(copy.deepcopy(network), n, tile_px, "cpu") for n in COUNTS]
                reason = None
            except Exception as real:
                reason = real
        if reason is not None:
            raise ConfigError(refusal(name, tile_px, reason, network)) from reason
    first, second = trials
    if unseen := first.unseen:
        raise ConfigError(
            f"--data.tile-px is {tile_px}, and {name} takes patches of {first.patch} px: it would never see the last "
            f"{unseen} pixels of a tile, so it must be a multiple, such as {tile_px - unseen} or "
            f"{tile_px - unseen + first.patch}"
        )
    if first.random:
        raise ConfigError(
            f"--model.encoder {name} draws random numbers in training ({', '.join(sorted(first.random))}), which "
            "would depend on how a slide is cut into chunks; take another encoder"
        )
    for layer, shapes in first.paths.items():
        others = second.paths[layer]
        rows, more = [shape[0] for shape in shapes], [shape[0] for shape in others]
        if [count * COUNTS[1] for count in rows] != [count * COUNTS[0] for count in more]:
            raise ConfigError(
                f"--model.drop-path: stochastic depth in {layer} of {name} is not over tiles ({rows} rows of "
                f"{COUNTS[0]} tiles, {more} of {COUNTS[1]}): set it to 0, or take another --model.encoder"
            )
    dims = []
    for trial in trials:
        output = trial.output
        if isinstance(output, Tensor):
            output = features(output)
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != trial.n:
            raise ConfigError(
                f"--model.encoder {name} does not return one vector per tile: {trial.n} tiles of {tile_px} px become "
                f"{_describe(output)}; take an encoder that pools, for models of the hub one whose global_pool is set"
            )
        dims.append(output.shape[1])
    assert dims[0] == dims[1]
    return dims[0]


def refusal(name: str, tile_px: int, error: BaseException, network: nn.Module | None = None, config: Any = None) -> str:
    """Say that tiles of this side do not go through a network, why, and what it takes.

    Args:
        config: timm's configuration of the network, where there is no network.
    """
    published = getattr(network, "pretrained_cfg", None) or (config.to_dict() if config is not None else {})
    wants = []
    if size := published.get("input_size"):
        wants.append(f"it is published for tiles of {size[-1]} px")
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if patch:
        wants.append(f"its patches are of {patch[0] if isinstance(patch, tuple) else patch} px")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"--model.encoder {name} does not take tiles of {tile_px} px ({reason})"
        + (f"; {' and '.join(wants)}" if wants else "")
        + ": set --data.tile-px to what it takes, or take another --model.encoder"
    )


class _Trial:
    """A forward in training mode.

    Attributes:
        n: number of tiles.
        output: what the network returned.
        paths: for each layer of stochastic depth that is on, the shapes that it was called with.
        random: names of operators that drew random numbers.
        unseen: pixels at the end of a tile's rows that the patch embedding leaves out.
        patch: side of a patch in pixels; 0 where there are none.
    """

    def __init__(self, network: nn.Module, n: int, tile_px: int, device: str) -> None:
        self.n = n
        self.paths: dict[str, list[tuple[int, ...]]] = {}
        self.patch = 0
        self._margins: list[int] = []
        network.train()
        for name, module in list(network.named_modules()):
            if isinstance(module, _BatchNorm):
                module.eval()
            elif type(module) is nn.Dropout:
                module.p = 0.0  # will be a tile's own (see `models/dropout.py`)
            elif isinstance(module, DropPath) and module.drop_prob:
                network.set_submodule(name, _Watched(self.paths.setdefault(name, []), module.drop_prob))
            elif isinstance(module, nn.Conv2d) and module.in_channels == 3:
                module.register_forward_pre_hook(self._note_border(tile_px))
        dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)
        tiles = torch.zeros((n, 3, tile_px, tile_px), device=device, dtype=dtype)
        with torch.no_grad(), _random_operators() as self.random:
            self.output = network(tiles)
        self.unseen = min(self._margins, default=0)

    def _note_border(self, tile_px: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(module, nn.Conv2d)
            if inputs[0].shape[-1] != tile_px:  # the network has padded or resized its input
                self._margins.append(0)
            elif module.kernel_size == module.stride and module.padding in (0, (0, 0)):
                self.patch = module.kernel_size[0]
                self._margins.append(tile_px % self.patch)
            else:
                self._margins.append(0)

        return note


class _Watched(DropPath):
    """A layer that notes what stochastic depth is called with, and drops nothing."""

    def __init__(self, shapes: list[tuple[int, ...]], drop_prob: float) -> None:
        super().__init__(drop_prob)
        self._shapes = shapes

    def forward(self, x: Tensor) -> Tensor:
        """x, as it is."""
        self._shapes.append(tuple(x.shape))
        return x


class _RandomOperators(TorchDispatchMode):
    """A mode that notes the names of operators that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            given |= kwargs or {}
            # Fused attention is among them also where it drops nothing.
            attention = "attention" in func._schema.name
            if not attention or given.get("dropout_p", 0.0):
                self.found.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _random_operators() -> Iterator[set[str]]:
    with _RandomOperators() as mode:
        yield mode.found


def _without_content(network: nn.Module) -> nn.Module:
    """A copy on the "meta" device, for which nothing is copied."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(network, memo)


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    if isinstance(output, tuple | list):
        return f"{len(output)} outputs"
    return f"a {type(output).__name__}"
