"""Problems of gated attention, and how far an answer is from the definition in fp64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slidescale.kernels.gated_attention import (
    Attended,
    Gate,
    GateDropout,
    gated_attention,
    reference,
)

triton_on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, its kernels are compiled: -m gpu")


# Sums in fp32 in another order: 1e-6 (measured). Features and weights that are rounded to fp16 exactly as the
# reference's are leave products rounded once on the way back: 5e-4 (measured).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


DROPOUT = GateDropout(p=0.25, seed=0x1234_5678_9ABC_DEF1, first_tile=1_000)


class Problem(NamedTuple):
    """Inputs, and what the gradients of scores, l and acc are; fp64, with values that fp16 has."""

    inputs: list[Tensor]
    grads: tuple[Tensor, Tensor, Tensor]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        inputs = [tensor.detach().to(device, dtype).requires_grad_() for tensor in self.inputs]
        accumulation = torch.promote_types(dtype, torch.float32)
        return Problem(inputs, tuple(grad.to(device, accumulation) for grad in self.grads))


def make_problem(k: int, dim: int, width: int, branches: int) -> Problem:
    generator = torch.Generator().manual_seed(k + dim + width + branches)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).half().double()

    gate = Gate(
        draw(width, dim, scale=dim**-0.5),
        draw(width, scale=0.1),
        draw(width, dim, scale=dim**-0.5),
        draw(width, scale=0.1),
        draw(branches, width, scale=3 * width**-0.5),
        draw(branches),
    )
    # Features as ReLU leaves them, and upstream gradients of one sign: a score's gradient is a sum over D, and would
    # else vanish for some tile by chance, where any rounding is large. The scores have other uses too, as a loss on the
    # attention's entropy would be one.
    grads = (draw(k, branches).abs(), draw(branches).abs(), draw(branches, dim, scale=dim**-0.5).abs())
    return Problem([draw(k, dim).abs(), *gate], grads)


Results = list[Tensor]


def results_of(attend: Callable[..., Attended], problem: Problem) -> Results:
    """Scores, m, l, acc, and the gradients of all inputs."""
    features, *gate = problem.inputs
    scores, partial = attend(features, Gate(*gate))
    finite = torch.where(scores.isinf(), 0, scores)  # of tiles that do not count
    grads = torch.autograd.grad((finite, partial.l, partial.acc), problem.inputs, problem.grads)
    return [tensor.detach() for tensor in (finite, *partial, *grads)]


def worst_error(results: Results, expected: Results) -> float:
    """Largest relative error, of a whole tensor; any that is not finite counts as infinite."""
    errors = [0.0]
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shape == theirs.shape
        size = theirs[~theirs.isinf()].norm().clamp_min(1e-6)
        error = torch.where(ours.double() == theirs, 0, ours.double() - theirs).norm() / size
        errors.append(float(error.nan_to_num(nan=torch.inf)))
    return max(errors)


def compare(problem: Problem, dtype: torch.dtype, kernels: str, device: str = "cpu", **options: Any) -> float:
    def attend(features: Tensor, gate: Gate) -> Attended:
        return gated_attention(features, gate, kernels=kernels, **options)

    def define(features: Tensor, gate: Gate) -> Attended:
        return reference.gated_attention(features, gate, **options)

    expected = results_of(define, problem.to(torch.float64, device))
    has_tiles = bool(expected[1].isfinite().all())
    assert bool(expected[3].norm() > 0) == has_tiles, "there is something to compare"
    return worst_error(results_of(attend, problem.to(dtype, device)), expected)
