"""The weights that a run leaves: those of its best epoch, under every strategy, and whole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.strategy import SingleStrategy
from slidescale.engine.training import checkpoint
from slidescale.engine.training.checkpoint import Checkpoints, Progress
from slidescale.engine.training.weights import WEIGHTS

from support import equivalence
from support.equivalence import Case, mesh_for
from support.grids import full
from support.runs import differing
from support.worlds import World

GetWorld = Callable[..., World]


CPU = torch.device("cpu")


def progress(epoch: int) -> Progress:
    return Progress(epoch=epoch, step=5 * epoch, slides_a_step=1, excluded={})


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Names and whole values of a model's state, by the tests' own gathering."""
    parameters = {name: equivalence.whole(value).clone() for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    names = model.state_dict().keys()
    return {name: (parameters | buffers)[name] for name in names}


def write_best(group: TileGroup, case: Case, folder: Path) -> None:
    """Train an epoch and mark it best, train another, and compare the file with both, and with the checkpoint."""
    mesh, model = mesh_for(case), equivalence.make_model(case)
    plain_names = set(model.state_dict())
    step = equivalence.make_step(case, model, mesh)
    strategy = step.strategy
    checkpoints = Checkpoints(folder / "checkpoints", mesh.world)
    equivalence.train(case, step)
    checkpoints.save(strategy, progress(1))
    checkpoints.mark_best(strategy, progress(1))
    best = state_of(model)
    assert set(best) == plain_names
    equivalence.train(case, step)
    checkpoints.save(strategy, progress(2))
    later = state_of(model)
    checkpoints.load(strategy, "best")
    restored = state_of(model)
    assert all(torch.equal(restored[name], best[name]) for name in best)
    assert differing(folder / WEIGHTS, best) == []
    assert len(differing(folder / WEIGHTS, later)) > 10, "the epochs differ, or equality proves nothing"


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp+offload", *full("zero0", "zero3+offload", "fsdp")])
def test_weights_are_those_of_the_best_checkpoint(world: GetWorld, tmp_path: Path, strategy: str) -> None:
    """Bit by bit; test_resnet has BatchNorm's buffers."""
    world(2).run(write_best, Case(strategy=strategy, aggregator="transformer+gated_attention"), tmp_path)


def test_weights_of_one_process(tmp_path: Path) -> None:
    model = equivalence.make_model(Case(strategy="single", encoder="test_vit"))
    strategy = SingleStrategy(model, torch.optim.SGD(model.parameters(), lr=0.1), None, device=CPU, clip=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", RankGroup())
    checkpoints.save(strategy, progress(1))
    checkpoints.mark_best(strategy, progress(1))
    stored = torch.load(tmp_path / "checkpoints" / "best" / "state.pt", weights_only=True)["model"]
    assert differing(tmp_path / WEIGHTS, stored) == []
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("after", [False, True])
def test_killed_as_it_marks_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """Before `best` has moved the old weights count, after it the new ones; a resume sees to that."""
    model = equivalence.make_model(Case(strategy="single", encoder="test_vit"))
    strategy = SingleStrategy(model, torch.optim.SGD(model.parameters(), lr=0.1), None, device=CPU, clip=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", RankGroup())
    checkpoints.save(strategy, progress(1))
    checkpoints.mark_best(strategy, progress(1))
    old = state_of(model)
    for parameter in model.parameters():
        parameter.data += 1
    new = state_of(model)
    checkpoints.save(strategy, progress(2))
    point = checkpoint.point

    def kill(link: Path, target: Path) -> None:
        if after:
            point(link, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "point", kill)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.mark_best(strategy, progress(2))
    assert differing(tmp_path / WEIGHTS, old) == []
    assert (tmp_path / f"{WEIGHTS}.unfinished").exists()
    resumed = Checkpoints(tmp_path / "checkpoints", RankGroup())
    resumed.load(strategy, "last")
    assert differing(tmp_path / WEIGHTS, new if after else old) == []
    assert not (tmp_path / f"{WEIGHTS}.unfinished").exists()


def test_half_written_weights_are_dropped(tmp_path: Path) -> None:
    model = equivalence.make_model(Case(strategy="single", encoder="test_vit"))
    strategy = SingleStrategy(model, torch.optim.SGD(model.parameters(), lr=0.1), None, device=CPU, clip=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", RankGroup())
    checkpoints.save(strategy, progress(1))
    checkpoints.mark_best(strategy, progress(1))
    unfinished = tmp_path / f"{WEIGHTS}.unfinished"
    unfinished.write_bytes((tmp_path / WEIGHTS).read_bytes()[:5000])
    checkpoints.load(strategy, "last")
    assert not unfinished.exists()
    assert differing(tmp_path / WEIGHTS, state_of(model)) == []
