"""The engine is exact: its parameters after several steps are those of plain autograd over all tiles."""

from collections.abc import Callable

import pytest
import torch

from equivalence import BAG_SIZES, compare, dropped_merge_term, refused_step, skipped_chunk
from worlds import World

GetWorld = Callable[[int], World]

# fp32 sums in another order: about 1e-6 after five steps (measured).
FP32_TOLERANCE = 5e-6
FP64_TOLERANCE = 1e-12


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3"])
def test_deepspeed_equals_plain_autograd(world: GetWorld, strategy: str, ranks: int) -> None:
    """SGD, so that rounding stays rounding: Adam would turn it into steps where a gradient is near zero."""
    errors = world(ranks).run(compare, strategy, "gated_attention")
    assert max(errors) <= FP32_TOLERANCE, errors


@pytest.mark.parametrize("pooling", ["gated_attention", "mean", "max", "gated_attention+slide_norm"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_fp64_equals_plain_autograd(world: GetWorld, ranks: int, pooling: str) -> None:
    """In doubles, whose rounding leaves no room for a small fault; DeepSpeed's own copies are fp32 at best."""
    errors = world(ranks).run(_compare_fp64, "mean", pooling, 2, "test_resnet")
    assert max(errors) <= FP64_TOLERANCE, errors


@pytest.mark.parametrize("chunk", [1, 3, max(BAG_SIZES) + 1])
def test_any_chunk_size(world: GetWorld, chunk: int) -> None:
    """How tiles are cut into chunks does not matter."""
    errors = world(3).run(_compare_fp64, "mean", "gated_attention", chunk, "test_resnet")
    assert max(errors) <= FP64_TOLERANCE, errors


@pytest.mark.parametrize("encoder", ["test_vit", "test_convnext", "test_efficientnet"])
def test_other_encoders(world: GetWorld, encoder: str) -> None:
    """Transformer, depth-wise convolutions with LayerNorm, squeeze-and-excitation."""
    errors = world(2).run(_compare_fp64, "mean", "gated_attention", 2, encoder)
    assert max(errors) <= FP64_TOLERANCE, errors


def test_one_process_without_deepspeed(world: GetWorld) -> None:
    """The plain strategy."""
    errors = world(1).run(compare, "single", "gated_attention")
    assert max(errors) <= FP32_TOLERANCE, errors


@pytest.mark.parametrize("strategy", ["mean", "zero2", "zero3"])
@pytest.mark.parametrize("bug", [dropped_merge_term, skipped_chunk])
def test_a_planted_bug_is_caught(world: GetWorld, strategy: str, bug: Callable) -> None:
    """The comparison fails, by far, when one rank's term or one chunk is missing."""
    errors = world(2).run(_compare_with_bug, strategy, bug)
    assert min(errors) > 100 * FP32_TOLERANCE, errors


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("strategy", ["zero0", "zero2", "zero3"])
def test_a_step_that_is_not_finite_is_refused(world: GetWorld, strategy: str, what: str) -> None:
    """On every rank alike, with the slide's name, and without moving a parameter."""
    for message, moved in world(2).run(refused_step, strategy, what):
        assert message.startswith("slide slide-0: ")
        assert what in message
        assert "no optimizer step was taken" in message
        assert moved == 0


def _compare_fp64(group, strategy: str, pooling: str, chunk: int, encoder: str) -> float:
    return compare(group, strategy, pooling, chunk=chunk, encoder=encoder, dtype=torch.float64)


def _compare_with_bug(group, strategy: str, bug: Callable) -> float:
    return compare(group, strategy, "gated_attention", mutation=bug)
