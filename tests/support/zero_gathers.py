"""What ZeRO-3 gathers in an epoch, counted."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry

from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.training import step

from support.equivalence import Case, make_model, make_step, mesh_for, train
from support.patching import patched


@dataclass
class Gathers:
    """What ZeRO-3 gathers in an epoch.

    Attributes:
        by_hooks: parameters that are gathered because a module is called, each time.
        on_access: parameters that are gathered because one that is not there is read.
        left: elements that are whole after a pass over the encoder, or after a step; the most at once.
    """

    by_hooks: int = 0
    on_access: int = 0
    left: int = 0


def gathers(_: TileGroup, case: Case, mutation: Callable[[], Any] = nullcontext) -> Gathers:
    """Train an epoch under ZeRO-3 and count."""
    mesh, model, counted = mesh_for(case), make_model(case), Gathers()
    with mutation():
        made = make_step(case, model, mesh)

    def count_hooks(original: Callable, registry: Any, parameter: Any, handle: Any) -> None:
        counted.by_hooks += 1
        original(registry, parameter, handle)

    def count_access(original: Callable, *args: Any, **kwargs: Any) -> Any:
        counted.on_access += 1
        return original(*args, **kwargs)

    def then_count_left(original: Callable, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        counted.left = max(counted.left, sum(parameter.numel() for parameter in model.parameters()))
        return result

    with ExitStack() as stack:
        stack.enter_context(patched(InflightParamRegistry, "__setitem__", count_hooks))
        for parameter in model.parameters():
            stack.enter_context(patched(parameter, "all_gather", count_access))
        for owner, name in ((step, "encode"), (step, "backpropagate"), (made.strategy, "step")):
            stack.enter_context(patched(owner, name, then_count_left))
        train(case, made)
    return counted
