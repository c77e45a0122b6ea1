"""Bugs to plant in the engine, each as a context, and steps that fail."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from slidescale.engine.errors import TrainingError
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies import zero as zero_module
from slidescale.engine.strategies.zero import ZeroStrategy
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training import step

from support.equivalence import Case, compare, make_model, make_step, mesh_for, train, whole, worst_error
from support.patching import patched


def dropped_merge_term() -> Any:
    """The last rank's features are left out of the merge (its weights are not: K = 1 would divide by zero)."""

    def merge(original: Callable, group: TileGroup, partial: Any) -> Tensor:
        return original(group, partial._replace(acc=partial.acc * 0) if group.rank == group.size - 1 else partial)

    return patched(TileGroup, "merge", merge)


def skipped_chunk() -> Any:
    """The encoder never hears of the gradient of each bag's first chunk."""

    def backpropagate(original: Callable, model: Any, chunks: Any, encoded: Any, backward: Any) -> None:
        encoded.features.grad[: chunks.size] = 0
        original(model, chunks, encoded, backward)

    return patched(step, "backpropagate", backpropagate)


def other_chunks_in_second_pass() -> Any:
    """Pass 2 cuts smaller chunks, as many, so that the last tiles are not among them."""

    def backpropagate(original: Callable, model: Any, chunks: Any, encoded: Any, backward: Any) -> None:
        original(model, replace(chunks, size=chunks.size - 1), encoded, backward)

    return patched(step, "backpropagate", backpropagate)


def silent_phase() -> Any:
    """From the second step on, the encoder gets no gradient at all, and what it got before may be applied again."""
    calls = []

    def backpropagate(original: Callable, model: Any, chunks: Any, encoded: Any, backward: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            original(model, chunks, encoded, backward)

    return patched(step, "backpropagate", backpropagate)


def reduced_at_each_backward() -> Any:
    """DeepSpeed reduces gradients as each backward ends, and not once a step."""

    @contextmanager
    def accumulate(original: Callable, strategy: Any, backwards: int) -> Iterator[None]:
        yield

    return patched(ZeroStrategy, "accumulate", accumulate)


def scaled_by_the_world() -> Any:
    """Each rank's loss is divided by their number, though the reducer takes the mean already."""

    def cross_entropy(original: Callable, self: CrossEntropy, logits: Tensor, target: Tensor) -> Tensor:
        return original(self, logits, target) / dist.get_world_size()

    return patched(CrossEntropy, "forward", cross_entropy)


def default_clipping() -> Any:
    """DeepSpeed's `gradient_clipping` is left out, which clips at a norm of 1; the loss is steep enough to show it."""

    def initialize(original: Callable, **settings: Any) -> Any:
        del settings["config"]["gradient_clipping"]
        return original(**settings)

    return patched(deepspeed, "initialize", initialize)


def refused_step(_: TileGroup, strategy_name: str, what: str) -> tuple[str, float]:
    """The error of a step whose loss or gradient is not finite, and how far the parameters moved in it."""
    case = Case(strategy=strategy_name, aggregator="mean")
    mesh, model = mesh_for(case), make_model(case)
    made = make_step(case, model, mesh)
    before = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}

    def broken(original: Callable, self: CrossEntropy, logits: Tensor, target: Tensor) -> Tensor:
        loss = original(self, logits, target)
        if what == "loss":
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    with patched(CrossEntropy, "forward", broken):
        try:
            train(case, made)
        except TrainingError as error:
            return str(error), worst_error(before, model)
    return "no error", worst_error(before, model)


def unmarked_forwards() -> Any:
    """ZeRO-3 gathers for modules that are called, and for nothing else."""
    return patched(zero_module, "_gather_on_access", lambda original, half: None)


def fail_alone(group: TileGroup, case: Case, told: Path) -> None:
    """The last rank's second pass fails; it must get out of the step with its error, and end."""

    def backpropagate(*_: Any) -> None:
        raise MemoryError("only this rank")

    if group.rank < group.size - 1:
        compare(group, case)
        return
    try:
        compare(group, case, lambda: patched(step, "backpropagate", backpropagate))
    except MemoryError as error:
        told.write_text(str(error))
        os._exit(3)
