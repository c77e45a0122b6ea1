"""What must not pass for equal does not, and a step that cannot be taken is refused on every rank."""

from pathlib import Path

import pytest

from support import faults
from support.compared import TOLERANCE, GetWorld, check
from support.equivalence import Case, compare
from support.faults import fail_alone, refused_step
from support.grids import full
from support.worlds import World


@pytest.mark.parametrize("strategy", ["zero2", *full("zero3")])
def test_a_rank_that_fails_alone_says_so(strategy: str, tmp_path: Path) -> None:
    """It does not wait, at the end of the step, for ranks that have met no error; and these notice its end."""
    two = World(2)
    with pytest.raises(AssertionError, match="died with exit code 3"):
        two.run(fail_alone, Case(strategy=strategy), tmp_path / "told")
    assert (tmp_path / "told").read_text() == "only this rank"


@pytest.mark.parametrize("strategy", ["ddp", "zero3", *full("mean", "fsdp", "zero2")])
@pytest.mark.parametrize(
    "bug", ["dropped_merge_term", "skipped_chunk", "other_chunks_in_second_pass", "scaled_by_the_world"]
)
def test_a_planted_bug_is_caught(world: GetWorld, strategy: str, bug: str) -> None:
    """The comparison fails, by far."""
    errors = world(2).run(compare, Case(strategy=strategy), getattr(faults, bug))
    assert min(errors) > 100 * TOLERANCE["float32"], errors


@pytest.mark.parametrize(
    ("strategy", "bug"),
    [("zero3", "reduced_at_each_backward"), ("zero0", "default_clipping"), ("zero2", "default_clipping")],
)
def test_a_trap_of_deepspeed_is_caught(world: GetWorld, strategy: str, bug: str) -> None:
    """Its defaults are wrong here, and the comparison says so, where without them it says that all is well."""
    case = Case(strategy=strategy, steepness=10)
    check(world(2), [case])
    errors = world(2).run(compare, case, getattr(faults, bug))
    assert min(errors) > 100 * TOLERANCE["float32"], errors


@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero2", "zero3"])
def test_a_stale_gradient_is_caught(world: GetWorld, strategy: str) -> None:
    """When a phase of the step contributes nothing, and what it gave before may be applied again."""
    errors = world(2).run(compare, Case(strategy=strategy), faults.silent_phase)
    assert min(errors) > 100 * TOLERANCE["float32"], errors


def test_fsdp_counts_backwards(world: GetWorld) -> None:
    """A phase that contributes nothing would leave its gradients unreduced."""
    with pytest.raises(AssertionError, match="backwards fewer than announced"):
        world(2).run(compare, Case(strategy="fsdp"), faults.silent_phase)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3", *full("zero0")])
def test_a_step_that_is_not_finite_is_refused(world: GetWorld, strategy: str, what: str) -> None:
    """On every rank alike, with the slide's name, and without moving a parameter."""
    for message, moved in world(2).run(refused_step, strategy, what):
        assert message.startswith("slide slide-")
        assert what in message
        assert "no optimizer step was taken" in message
        assert moved == 0
