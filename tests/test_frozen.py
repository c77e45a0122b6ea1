"""The frozen baseline: features computed once, and the aggregator trained on them as it is end to end."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from slidescale.engine import logger
from slidescale.engine.commands import recipe as main
from slidescale.engine.config import Config, ModelConfig, RunConfig
from slidescale.engine.data import features as features_module
from slidescale.engine.data.bag import draw_bag, epoch_order
from slidescale.engine.data.features import FeatureReader, FeatureStore
from slidescale.engine.data.manifest import ManifestRow, read_manifest
from slidescale.engine.data.prefetch import TileRequest
from slidescale.engine.data.slide import open_slide
from slidescale.engine.data.tiling import TileSpec, Tiling, cached_tiling
from slidescale.engine.errors import ConfigError, SlideError, UserError
from slidescale.engine.memory.footprint import measure
from slidescale.engine.memory.needs import Job
from slidescale.engine.memory.planner import choose
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.make import make_model
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.optim import make_optimizer, parameter_groups
from slidescale.engine.strategies.schedule import GroupSchedule, make_schedule
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.frozen import fingerprint

from support.frozen import kept, losses, make_frozen_config, write_weights
from support.recipes import load
from support.slides import damage
from support.tables import read_csv

ROOT = Path(__file__).parent.parent
SPEC = TileSpec(tile_px=64, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "weights.pth")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Tiles that went through an encoder since the last question."""
    seen = [0]
    original = Encoder.forward

    def forward(self: Encoder, tiles: Tensor) -> Tensor:
        if tiles.device.type != "meta" and type(tiles) is Tensor:
            seen[0] += len(tiles)
        return original(self, tiles)

    def ask() -> int:
        count, seen[0] = seen[0], 0
        return count

    monkeypatch.setattr(Encoder, "forward", forward)
    return ask


def read_all_tiles(row: ManifestRow, tiling: Tiling) -> Tensor:
    with open_slide(row.path) as slide:
        return torch.from_numpy(np.stack([slide.read(int(x), int(y), (64, 64), 0.5) for x, y in tiling.coords]))


def test_features_are_the_encoders_own(demo_manifest: Path, tmp_path: Path, weights: Path) -> None:
    config = make_frozen_config(demo_manifest, tmp_path, weights)
    folder = main.run(config)
    files = kept(tmp_path)
    rows = read_manifest(demo_manifest, config.data).rows
    assert set(files) == {row.slide_id for row in rows}, "of all splits, and nothing unfinished beside them"
    encoder = Encoder("test_resnet", tile_px=64, weights=weights).eval()
    tiling = cached_tiling(rows[0].path, SPEC, tmp_path / "tilings")
    found = load_file(files[rows[0].slide_id])
    assert np.array_equal(found["coords"].numpy(), tiling.coords)
    with torch.no_grad():
        expected = encoder(read_all_tiles(rows[0], tiling))
    # A batch of another size may add up in another order.
    torch.testing.assert_close(found["features"], expected, rtol=1e-5, atol=1e-6)
    assert expected.std(0).max() > 1e-3, "tiles differ"
    state = torch.load(folder / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert state["model"] and all(name.startswith("aggregator.") for name in state["model"])
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["model"]["frozen"] and record["frozen_encoder"] == fingerprint(encoder)
    assert "scalars" in EventAccumulator(str(folder)).Reload().Tags()


def test_the_aggregator_trains_as_plain_autograd_on_these_features(
    demo_manifest: Path, tmp_path: Path, weights: Path
) -> None:
    """An epoch, from the files, without the engine's feed, step and reader."""
    config = make_frozen_config(demo_manifest, tmp_path, weights)
    folder = main.run(config)
    rows = [row for row in read_manifest(demo_manifest, config.data).rows if row.split == "train"]
    assert len(rows) >= 3
    model = make_model(config, classes=2, bf16=False, kernels="torch").without_encoder()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(parameter_groups(model, config.optim), config.optim)
    scheduler = GroupSchedule(optimizer, config.optim, make_schedule(config, steps_an_epoch=len(rows)))
    objective, told = CrossEntropy((), 2), []
    for row in epoch_order(rows, seed=0, epoch=0):
        bag = draw_bag(row, cached_tiling(row.path, SPEC, tmp_path / "tilings"), 12, seed=0, epoch=0)
        file = load_file(kept(tmp_path)[row.slide_id])
        places = {tuple(place): index for index, place in enumerate(file["coords"].tolist())}
        features = file["features"][[places[x, y] for x, y in bag.coords.tolist()]]
        logits, _ = model.aggregate(features, bag.places, TileGroup())
        loss = objective(logits, torch.tensor(row.target))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        told.append(loss.item())
    assert losses(folder) == pytest.approx(told, rel=1e-5)
    found = torch.load(folder / "checkpoints" / "last" / "state.pt", weights_only=True)["model"]
    assert found.keys() == start.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert max(float((found[name] - start[name]).abs().max()) for name in start) > 1e-3, "it has moved"


def test_it_starts_as_end_to_end_does(demo_manifest: Path, tmp_path: Path, weights: Path) -> None:
    """The same bags, and the same aggregator: only what trains differs."""
    frozen = main.run(make_frozen_config(demo_manifest, tmp_path, weights, name="frozen"))
    trained = main.run(make_frozen_config(demo_manifest, tmp_path, weights, name="trained", frozen=False))
    first, second = losses(frozen), losses(trained)
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    assert first[-1] != pytest.approx(second[-1], rel=1e-5)
    ours, theirs = read_csv(frozen / "predictions.csv"), read_csv(trained / "predictions.csv")
    assert [(row["slide_id"], row["k"]) for row in ours] == [(row["slide_id"], row["k"]) for row in theirs]


def test_a_second_run_reads_and_does_not_encode(
    demo_manifest: Path, tmp_path: Path, weights: Path, encoded: Callable[[], int]
) -> None:
    first = main.run(make_frozen_config(demo_manifest, tmp_path, weights))
    files = kept(tmp_path)
    tiles = {name: len(load_file(file)["coords"]) for name, file in files.items()}
    assert encoded() == sum(tiles.values()), "each tile once"
    second = main.run(make_frozen_config(demo_manifest, tmp_path, weights))
    assert encoded() == 0
    assert losses(first) == losses(second)

    spoilt, *_ = files
    files[spoilt].write_bytes(files[spoilt].read_bytes()[:-100])
    main.run(make_frozen_config(demo_manifest, tmp_path, weights))
    assert encoded() == tiles[spoilt], "a file that is cut short is written again"

    write_weights(weights, seed=2)
    third = main.run(make_frozen_config(demo_manifest, tmp_path, weights))
    assert encoded() == sum(tiles.values()), "other weights, by the same name"
    assert losses(third) != losses(first)
    assert len(list((tmp_path / "features").iterdir())) == 2
    write_weights(weights, seed=3)
    longer = make_frozen_config(demo_manifest, tmp_path, weights, epochs=2)
    with pytest.raises(UserError, match="--resume: .*was begun with other weights of the frozen encoder"):
        main.run(dataclasses.replace(longer, resume=True))


def test_another_precision_or_tile_has_other_features(tmp_path: Path) -> None:
    def folder(**changes: Any) -> Path:
        given = {"encoder": "hf-hub:a/b", "fingerprint": "1", "precision": "fp32", "dim": 8}
        spec = dataclasses.replace(SPEC, **{key: changes.pop(key) for key in list(changes) if hasattr(SPEC, key)})
        return FeatureStore(tmp_path, spec, **(given | changes)).folder

    folders = [folder(), folder(precision="bf16"), folder(fingerprint="2"), folder(encoder="b"), folder(mpp_um=1.0)]
    assert len(set(folders)) == len(folders)
    assert folder() == folder()
    assert folder().parent == tmp_path, "a slash in a name makes no folder"


def test_the_fingerprint_is_of_all_that_features_follow_from() -> None:
    torch.manual_seed(0)
    encoder = Encoder("test_resnet", tile_px=64)
    before = fingerprint(encoder)
    assert before == fingerprint(encoder)
    for name, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:
        if tensor.is_floating_point() and "stain" not in name:
            old = tensor.detach().clone()
            with torch.no_grad():
                tensor.view(-1)[-1] += 1
            assert fingerprint(encoder) != before, name
            with torch.no_grad():
                tensor.copy_(old)
    assert fingerprint(encoder) == before


def test_reading_features(tmp_path: Path, demo_manifest: Path) -> None:
    slide = next((demo_manifest.parent / "slides").iterdir())
    x, y = np.meshgrid(np.arange(7) * 130, np.arange(5) * 129)
    tiling = Tiling(np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int64), 129.5)
    store = FeatureStore(tmp_path, SPEC, encoder="e", fingerprint="1", precision="fp32", dim=3)
    features = torch.randn(35, 3)
    assert not store.has(slide, tiling)
    store.save(slide, tiling, features)
    assert store.has(slide, tiling)
    reader = FeatureReader(store, threads=2, pin=False)
    chosen = [[0], [34], [3, 7, 8, 20, 33], [], list(range(35))]
    requests = [TileRequest(slide, tiling.coords[rows]) for rows in chosen]
    for rows, reading in zip(chosen, reader.ahead(requests, 2), strict=True):
        assert torch.equal(reading.wait(), features[rows])
    assert torch.equal(reader.blank(2), torch.zeros(2, 3))
    for other in ([[1, 0]], [[10_000, 10_000]]):
        reading = next(iter(reader.ahead([TileRequest(slide, np.array(other))], 0)))
        with pytest.raises(SlideError, match="its features are of other tiles"):
            reading.wait()
    assert not store.has(slide, Tiling(tiling.coords[1:], 129.5)), "another tiling"
    reading = next(iter(reader.ahead([TileRequest(slide, tiling.coords)], 0)))
    with pytest.raises(SlideError, match="cannot read its features"):
        reading.wait()
    reader.close()


def test_encoding_tells_how_far_it_is(
    demo_manifest: Path,
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a terminal, in lines."""
    monkeypatch.setattr(logger, "LINE_EVERY_S", 0.0)
    with caplog.at_level("INFO", logger="slidescale"):
        main.run(make_frozen_config(demo_manifest, tmp_path, weights))
    told = re.findall(r"encoding: ([\d,]+) of ([\d,]+) tiles \((\d+)%\), [\d.,]+ tiles/", caplog.text)
    assert len(told) >= len(kept(tmp_path))
    done = [int(words[0].replace(",", "")) for words in told]
    assert done == sorted(set(done))
    assert told[-1][0] == told[-1][1] and told[-1][2] == "100"


def test_unreadable_slides_are_set_aside(cohort_copy: Path, tmp_path: Path, weights: Path) -> None:
    rows = read_csv(cohort_copy)
    spoilt = [next(row for row in rows if row["split"] == split) for split in ("train", "val")]
    for row in spoilt:
        damage(cohort_copy.parent / row["path"])
    folder = main.run(make_frozen_config(cohort_copy, tmp_path, weights))
    reasons = {row["slide_id"]: row["reason"] for row in read_csv(folder / "excluded.csv")}
    assert set(reasons) == {row["slide_id"] for row in spoilt}
    assert all("cannot read at" in reason for reason in reasons.values())
    assert not set(kept(tmp_path)) & set(reasons), "no file of a part of a slide"


def test_a_full_disk_is_told(
    demo_manifest: Path, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features_module, "save_file", fail)
    with pytest.raises(UserError, match="cannot write features to .*No space left"):
        main.run(make_frozen_config(demo_manifest, tmp_path, weights))
    assert not kept(tmp_path)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"augment_symmetry": True}),
        ("data", {"stain_jitter": 0.1}),
        ("model", {"drop_path": 0.1}),
        ("model", {"lora_rank": 2}),
        ("optim", {"encoder_lr_scale": 0.5}),
        ("optim", {"layer_decay": 0.7}),
        ("optim", {"encoder_frozen_epochs": 1}),
        ("memory", {"policy": "keep"}),
        ("memory", {"checkpoint_blocks": True}),
    ],
)
def test_what_needs_an_encoder_that_trains_is_refused(section: str, values: dict[str, Any]) -> None:
    frozen = Config(run=RunConfig(name="t"), model=ModelConfig(frozen=True))
    name = next(iter(values)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{section}.{name} is .*: --model.frozen"):
        dataclasses.replace(frozen, **{section: dataclasses.replace(getattr(frozen, section), **values)})


@pytest.mark.parametrize("name", ["egfr", "breast", "finetune_vit"])
@pytest.mark.parametrize("settings", ["STUDY", "DEMO"])
def test_a_recipe_with_a_frozen_encoder_says_all_that_is_to_be_typed(
    name: str, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the words that the error tells make it a run."""
    ran: list[Config] = []
    monkeypatch.setattr(main, "run", ran.append)
    monkeypatch.setattr(main, "configure_logging", lambda is_main: None)
    default = getattr(load(name), settings)
    words = ["--model.frozen", "--run.epochs", "1"]

    def start(*extra: str) -> None:
        main.main("A recipe.", default=default, demo=default, argv=[*words, *extra])

    if (name, settings) != ("egfr", "STUDY"):
        with pytest.raises(SystemExit, match="--model.frozen") as caught:
            start()
        before, told = str(caught.value).split("to leave them at their defaults, add: ")
        assert len(before.splitlines()) == told.count("--")
        if (name, settings) == ("finetune_vit", "STUDY"):
            assert told.count("--") == 6
        words += told.split()
    start()
    assert ran[0].model.frozen and ran[0].optim.encoder_lr_scale == 1


def test_the_plan_counts_features_and_no_encoder() -> None:
    config = Config(run=RunConfig(name="t"), model=ModelConfig(encoder="test_vit", frozen=True))
    model = make_model(config, classes=2, bf16=False, kernels="torch")
    tile = torch.empty(model.encoder.dim)
    footprint = measure(model.without_encoder(), tile, chunks=[1, 1024], bags=[1, 1000])
    assert footprint.tile_bytes == 4 * footprint.dim
    curves = (footprint.forward, footprint.graph, footprint.backward, footprint.building, footprint.storage)
    assert not any(curve(1000) for curve in curves)
    assert footprint.parameters == sum(parameter.numel() for parameter in model.aggregator.parameters())
    plan = choose(Job(footprint=footprint), k=1000, budget=2**31, base=0, policy="recompute", chunk=1024)
    assert plan.need.pixels == 2 * 1000 * 4 * footprint.dim
    assert plan.stored == plan.stored_chunks(1000) == 0
