"""The engine as a library: the documentation's code runs, and any encoder and aggregator train exactly."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import slidescale.engine as engine
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.parallel.mesh import make_mesh
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.seeding import seeded

from support.equivalence import whole
from support.grids import rest_in_full
from support.transmil import TransMil
from support.worlds import World

ROOT = Path(__file__).parent.parent
STRATEGIES = ["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"]
BAG_SIZES = (7, 1, 5, 2)
LR = 0.05


def blocks(page: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


def test_readme_runs_as_it_stands(tmp_path: Path) -> None:
    """Pasted into a file outside the repository."""
    (code,) = (block for block in blocks("README.md") if "make_step" in block)
    script = tmp_path / "train.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.splitlines()]
    assert len(losses) == 6 and sum(losses[4:]) < sum(losses[:2]), "it learns from each of two slides"


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    """One after another, in one process."""
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks("docs/library.md")))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").exists()
    assert done.stdout.count("\n") >= 8


def test_the_face_needs_no_torch_until_it_is_used() -> None:
    code = "import sys, slidescale.engine as e; assert 'torch' not in sys.modules; e.Bag; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {"SlideModel", "Gathered", "Bag", "make_step", "encode", "backpropagate", "join", "train"} <= set(
        dir(engine)
    )
    for name in dir(engine):
        assert getattr(engine, name) is not None
    with pytest.raises(AttributeError, match="no attribute step"):
        engine.step  # noqa: B018


class Encoder(nn.Module):
    """Of points, and not of pictures: `[n, 3, 4]` to `[n, 6]`, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 6))

    def forward(self, tiles: Tensor) -> Tensor:
        return self.layers(tiles)


def make_model() -> engine.SlideModel:
    torch.manual_seed(0)
    return engine.SlideModel(Encoder(), engine.Gathered(TransMil(6, 3, dropout=0.2))).train()


def slides() -> Iterator[tuple[Tensor, int, int]]:
    """Tiles, label and seed of each slide."""
    for index, k in enumerate(BAG_SIZES):
        generator = torch.Generator().manual_seed(index)
        yield torch.randn(k, 3, 4, generator=generator), index % 3, 100 + index


def plain(kind: type[torch.optim.Optimizer], per_step: int = 1) -> dict[str, Tensor]:
    """Parameters after plain autograd through each slide as a whole."""
    model = make_model()
    optimizer = kind(model.parameters(), lr=LR)
    for number, (tiles, label, seed) in enumerate(slides(), start=1):
        with drawing_for(Draw(seed, 0, len(tiles))):
            features = model.encode(tiles)
            with seeded(torch.device("cpu"), seed, "aggregator"):
                logits, _ = model.aggregate(features, torch.zeros(len(tiles), 2), TileGroup())
        (cross_entropy(logits, torch.tensor(label)) / per_step).backward()
        if number % per_step == 0:
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def trained(group: TileGroup, strategy: str, policy: Any, kind: type[torch.optim.Optimizer], per_row: int) -> float:
    """Largest error of a parameter, relative to its norm."""
    mesh = make_mesh(torch.device("cpu"), per_row)
    model = make_model()
    optimizer = kind(model.parameters(), lr=LR)
    step = engine.make_step(model, optimizer, cross_entropy, mesh=mesh, strategy=strategy, policy=policy, chunk=2)
    own = list(slides())[mesh.slide :: mesh.slides]
    for tiles, label, seed in own:
        step(engine.Bag(tiles[mesh.tiles.share(len(tiles))], label, seed=seed))
    expected = plain(kind, mesh.slides)
    return max(
        float((whole(parameter) - expected[name]).norm() / expected[name].norm().clamp_min(1e-3))
        for name, parameter in model.named_parameters()
    )


# fp32 sums in another order, over four steps, of which each feeds the next.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    rest_in_full([*zip(STRATEGIES, cycle([2, 3, 1, 2]))], [*product(STRATEGIES, [1, 2, 3])]),
)
def test_any_aggregator_trains_exactly(world: Callable[..., World], strategy: str, ranks: int) -> None:
    policy = {1: "auto", 2: "recompute", 3: "keep"}[ranks]
    assert max(world(ranks).run(trained, strategy, policy, torch.optim.SGD, ranks)) <= TOLERANCE


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_slides_side_by_side(world: Callable[..., World], strategy: str) -> None:
    assert max(world(2).run(trained, strategy, "recompute", torch.optim.SGD, 1)) <= TOLERANCE


def dropped_gradients(_: TileGroup, strategy: str) -> float:
    """As `trained`, with a gather whose backward keeps a rank's own part alone."""
    from slidescale.engine.parallel import collectives

    original = collectives._AllGatherRows.backward

    def own_part(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rank = torch.distributed.get_rank()
        return grads[0].split(ctx.counts)[rank], None, None

    collectives._AllGatherRows.backward = staticmethod(own_part)  # type: ignore[assignment]
    try:
        return trained(_, strategy, "recompute", torch.optim.SGD, torch.distributed.get_world_size())
    finally:
        collectives._AllGatherRows.backward = original  # type: ignore[method-assign]


def test_a_gather_that_does_not_sum_is_caught(world: Callable[..., World]) -> None:
    assert min(world(2).run(dropped_gradients, "ddp")) > 100 * TOLERANCE


def test_one_process_without_a_world() -> None:
    """And slides one after another before an update, with their own loss and scheduler, and any policy."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scheduler = lambda made: torch.optim.lr_scheduler.ConstantLR(made, factor=1.0)  # noqa: E731
    step = engine.make_step(model, optimizer, cross_entropy, mesh=engine.Mesh(), scheduler=scheduler, chunk=3)
    assert step.strategy.name == "single"
    bags = [engine.Bag(tiles, label, seed=seed) for tiles, label, seed in slides()]
    results = [step(*bags[:2]), step(*bags[2:])]
    expected = plain(torch.optim.SGD, per_step=2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=TOLERANCE, atol=1e-6)
    assert all(result.attention_entropy != result.attention_entropy for result in results), "it has no weights"


def test_predictions_do_not_depend_on_chunks() -> None:
    tiles, _, _ = next(slides())
    found = []
    for chunk in (1, 3, 100):
        model = make_model()
        step = engine.make_step(
            model, torch.optim.SGD(model.parameters()), cross_entropy, mesh=engine.Mesh(), chunk=chunk
        )
        logits, weights = step.predict(engine.Bag(tiles))
        assert weights is None and model.training, "the mode is as it was"
        found.append(logits)
    with torch.no_grad():
        expected = model.eval().aggregator.module(model.encode(tiles))[0]
    for logits in found:
        torch.testing.assert_close(logits, expected)


def test_a_prediction_leaves_each_module_in_its_mode() -> None:
    """An encoder in evaluation mode, whose BatchNorm layers keep their statistics, stays so."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6)).eval()
    model = engine.SlideModel(encoder, engine.Gathered(TransMil(6, 3)))
    step = engine.make_step(model, torch.optim.SGD(model.parameters()), cross_entropy, mesh=engine.Mesh(), chunk=3)
    tiles, label, _ = next(slides())
    for _ in range(2):
        step(engine.Bag(tiles, label))
        step.predict(engine.Bag(tiles))
        assert not encoder.training and model.aggregator.training and model.training


class WithWeights(nn.Module):
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        weights = features[:, 0].softmax(dim=0)
        return weights @ features[:, :2], weights


def test_an_aggregator_may_give_weights() -> None:
    model = engine.SlideModel(Encoder(), engine.Gathered(WithWeights()))
    step = engine.make_step(model, torch.optim.SGD(model.parameters()), cross_entropy, mesh=engine.Mesh(), chunk=3)
    tiles, _, _ = next(slides())
    result = step(engine.Bag(tiles, 1))
    assert 0 < result.attention_entropy <= 1 < result.effective_tiles <= len(tiles)


def wrong_share(group: TileGroup) -> str:
    """The message on this rank, of a bag of which the last rank has a tile too few, and the first one too many."""
    mesh = make_mesh(torch.device("cpu"), "all")
    model = make_model()
    step = engine.make_step(model, torch.optim.SGD(model.parameters()), cross_entropy, mesh=mesh, strategy="ddp")
    with pytest.raises(UserError) as caught:
        step(engine.Bag(torch.randn(4 if group.rank == 0 else 2, 3, 4), 0, name="S-001"))
    with pytest.raises(UserError, match="rank 0 has 2, rank 1 has 1"):
        step(*[engine.Bag(torch.randn(1, 3, 4))] * (2 - group.rank))
    return str(caught.value)


def test_wrong_shares_are_refused_on_every_rank(world: Callable[..., World]) -> None:
    first, second = world(2).run(wrong_share)
    assert first == second
    assert first.startswith(
        "S-001: rank 0 of 2 has 4 of its 6 tiles, and must have 3: give each rank the rows mesh.tiles"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "zero"}, "strategy zero takes a ds_config"),
        ({"strategy": "zero4"}, "strategy is 'zero4': must be auto, single"),
        ({"chunk": 0}, "memory.chunk"),
        ({"budget": "much"}, "must be a size such as 8GiB"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], message: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        engine.make_step(model, torch.optim.SGD(model.parameters()), cross_entropy, mesh=engine.Mesh(), **change)


def test_zero_takes_no_optimizer_that_looks_at_whole_parameters() -> None:
    model = make_model()
    with pytest.raises(
        ConfigError, match="may only with an optimizer that updates each element.*not known of Adafactor"
    ):
        engine.make_step(model, torch.optim.Adafactor(model.parameters()), cross_entropy, strategy="zero2")


def test_modules_that_do_not_fit_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"TransMil does not take \(features, places, group\).*Gathered\(TransMil"):
        engine.SlideModel(Encoder(), TransMil(6, 3))
    model = make_model()
    half = torch.optim.SGD(model.aggregator.parameters())
    with pytest.raises(ConfigError, match=r"parameters train and are in no group.*encoder\.layers\.1\.weight"):
        engine.make_step(model, half, cross_entropy, mesh=engine.Mesh())
    strange = torch.optim.SGD(make_model().parameters())
    with pytest.raises(ConfigError, match="parameters that are not the model's"):
        engine.make_step(model, strange, cross_entropy, mesh=engine.Mesh())
    for encoder, aggregator, message in (
        (nn.Identity(), engine.Gathered(TransMil(6, 3)), r"encoder returns \[2, 3, 4\] for 2 tiles"),
        (Encoder(), engine.Gathered(nn.Identity()), r"Identity returns \[2, 6\] for a slide"),
    ):
        broken = engine.SlideModel(encoder, aggregator).eval()
        with pytest.raises(ConfigError, match=message):
            broken.aggregate(broken.encode(torch.zeros(2, 3, 4)), torch.zeros(2, 2), TileGroup())


class LooksAtValues(nn.Module):
    """Of the features only those above 0 count, and so many: what has no shape without content."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.never_copied = (each for each in ())  # nor can it be copied

    def forward(self, features: Tensor) -> Tensor:
        kept = features[features[:, 0] > features[:, 0].median().item()]
        return self.layer(kept.mean(dim=0) if len(kept) else features.mean(dim=0))


def test_what_cannot_be_measured_trains_with_chunk_and_policy() -> None:
    tiles, _, _ = next(slides())
    for policy, stored in (("recompute", 0), ("keep", 3)):
        model = engine.SlideModel(Encoder(), engine.Gathered(LooksAtValues()))
        settings: Any = {"mesh": engine.Mesh(), "chunk": 3, "policy": policy}
        step = engine.make_step(model, torch.optim.SGD(model.parameters()), cross_entropy, **settings)
        assert step(engine.Bag(tiles, 1)).gradient_norms["encoder"] > 0
        assert step.plan is not None and step.plan.stored_chunks(7) == stored
    model = engine.SlideModel(Encoder(), engine.Gathered(LooksAtValues()))
    step = engine.make_step(model, torch.optim.SGD(model.parameters()), cross_entropy, mesh=engine.Mesh(), chunk=3)
    with pytest.raises(ConfigError, match="cannot be copied"):
        step(engine.Bag(tiles, 1))
