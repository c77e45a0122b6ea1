"""What a run leaves is enough to predict with: its weights under every strategy, on any ranks, in any chunks."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slidescale.engine.commands import predict as predict_module
from slidescale.engine.commands import recipe as main
from slidescale.engine.commands.predict import (
    ComputeSettings,
    Failure,
    Predictor,
    PredictRequest,
    SlidePrediction,
    name_files,
    predict_slides,
    predict_with,
)
from slidescale.engine.commands.trained import load_run
from slidescale.engine.config import ModelConfig
from slidescale.engine.data.manifest import NamedFile, read_files
from slidescale.engine.errors import ConfigError, ManifestError, UserError
from slidescale.engine.files import write_csv
from slidescale.engine.models.make import make_model
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.strategy import SingleStrategy
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.checkpoint import Checkpoints, Progress
from slidescale.engine.training.weights import WEIGHTS, write_weights

import test_frozen
from conftest import damage, edit_manifest, read_csv
from support import equivalence
from support.equivalence import Case, dropped_merge_term, mesh_for
from support.runs import write_run
from support.worlds import World, free_port
from test_training import make_config

GetWorld = Callable[..., World]
CPU = torch.device("cpu")
# fp32 rounds to 6e-8 of a value at each of some tens of layers, in an order that batch sizes and ranks change.
TOLERANCE = 1e-5


def progress(epoch: int) -> Progress:
    return Progress(epoch=epoch, step=5 * epoch, slides_a_step=1, excluded={})


# ---- (a) the weights


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Names and whole values of a model's state, by the tests' own gathering."""
    parameters = {name: equivalence.whole(value).clone() for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    names = model.state_dict().keys()
    return {name: (parameters | buffers)[name] for name in names}


def differing(path: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    found = load_file(path)
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value.cpu())]


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


@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero2", "zero3", "zero3+offload", "fsdp", "fsdp+offload"])
def test_weights_are_those_of_the_best_checkpoint(world: GetWorld, tmp_path: Path, strategy: str) -> None:
    """Bit by bit; test_resnet has BatchNorm's buffers."""
    world(2).run(write_best, Case(strategy=strategy, aggregator="split+gated_attention"), tmp_path)


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
    point = Checkpoints._point

    def kill(self: Checkpoints, link: str, target: Path) -> None:
        if after:
            point(self, link, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_point", kill)
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


# ---- (b) runs


@pytest.mark.parametrize(
    "model",
    [
        {"encoder": "test_resnet", "drop_path": 0.2},
        {"encoder": "test_vit", "lora_rank": 2, "drop_path": 0.2, "dropout": 0.3},
        {"encoder": "test_vit", "transformer_layers": 1, "transformer_heads": 2, "attention_branches": 3},
        {"encoder": "test_convnext", "slide_norm": True, "pooling": "max", "attention_dim": 384},
    ],
)
def test_a_run_is_loaded_as_it_was(tmp_path: Path, model: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "r", **model)
    run = load_run(folder, CPU)
    assert (run.epoch, run.step, run.classes) == (3, 30, ("wild_type", "mutant"))
    assert run.config.model == dataclasses.replace(make_config(Path("x"), tmp_path).model, **model)
    assert differing(folder / WEIGHTS, run.model.state_dict()) == []
    assert not run.model.training


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_settings_return_from_json(trained_run: Path, demo_manifest: Path) -> None:
    written = make_config(demo_manifest, trained_run.parent)
    assert load_run(trained_run, CPU).config == written


def test_a_setting_that_was_not_there_has_its_default(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    change_json(folder / "config.json", lambda content: content["config"]["model"].pop("drop_path"))
    assert load_run(folder, CPU).config.model.drop_path == ModelConfig().drop_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no run .*/run-b, did you mean 'run-a'"),
        (lambda folder: (folder / "config.json").unlink(), "is not the folder of a run: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), "is unfinished: it has no model.safetensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"12345678"), "model.safetensors is damaged"),
        (
            lambda folder: change_json(folder / "config.json", lambda c: c["config"]["model"].update(hiden_dim=3)),
            "by slidescale 0.1.0, with settings that this version does not have:\n  model.hiden_dim, did you mean "
            "'model.hidden_dim'",
        ),
        (
            lambda folder: change_json(folder / "config.json", lambda c: c["config"]["model"].update(dropout=3)),
            "this version refuses: --model.dropout is 3",
        ),
        (
            lambda folder: change_json(
                folder / "config.json", lambda c: c["config"]["model"].update(pooling="mean", attention_dim=384)
            ),
            "do not have the same parts: aggregator.pooling.u_bias",
        ),
        (
            lambda folder: change_json(folder / "config.json", lambda c: c["config"]["model"].update(hidden_dim=32)),
            "does not fit the model of",
        ),
        (
            lambda folder: (
                (folder / "checkpoints/epoch-0004").mkdir(parents=True),
                (folder / "checkpoints/best").symlink_to("epoch-0004"),
            ),
            "is of epoch 3, and .* is epoch-0004: the run was killed",
        ),
    ],
)
def test_what_is_no_finished_run(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    write_run(tmp_path / "run-a")
    folder = write_run(tmp_path / "run-b")
    change(folder)
    with pytest.raises(UserError, match=message):
        load_run(folder, CPU)


# ---- (c) predictions


def answers(group: TileGroup, folder: Path, files: list[NamedFile], chunk: int) -> list[Any]:
    """(probabilities, weights) of each slide, or why there are none; on every rank of a world, or one process."""
    mesh = Mesh() if group.size == 1 else equivalence._mesh(group.size)
    predictor = Predictor(load_run(folder, CPU), ComputeSettings(chunk=chunk), mesh, CPU)
    found = {each.file.slide_id: each for each in predictor.predict(files)}
    in_order = [found[file.slide_id] for file in files]
    return [each.reason if isinstance(each, Failure) else (each.output, each.weights) for each in in_order]


def answers_without_a_rank(group: TileGroup, folder: Path, files: list[NamedFile], chunk: int) -> list[Any]:
    with dropped_merge_term():
        return answers(group, folder, files, chunk)


def worst(expected: list[Any], found: list[Any]) -> float:
    return max(
        float(np.abs(a - b).max()) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.fixture(scope="module")
def sharp_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose probabilities differ from slide to slide, with a transformer, so that places matter too."""
    return write_run(tmp_path_factory.mktemp("sharp") / "r", transformer_layers=1, transformer_heads=2)


def test_ranks_and_chunks_do_not_change_a_probability(
    world: GetWorld, sharp_run: Path, demo_manifest: Path, real_slide: Path
) -> None:
    files = [*read_files(demo_manifest, make_config(demo_manifest, sharp_run).data)[:2], NamedFile("real", real_slide)]
    expected = answers(TileGroup(), sharp_run, files, 64)
    assert len({round(float(probabilities[1]), 4) for probabilities, _ in expected}) == 3, "not all alike"
    assert all(weights.sum() == pytest.approx(1, abs=1e-5) for _, weights in expected)
    for chunk in (7, 10_000):
        assert worst(expected, answers(TileGroup(), sharp_run, files, chunk)) <= TOLERANCE
    for chunk in (7, 64, 10_000):
        for found in world(2).run(answers, sharp_run, files, chunk):
            assert worst(expected, found) <= TOLERANCE
    found = world(2).run(answers_without_a_rank, sharp_run, files, 64)[0]
    assert worst(expected, found) > 10 * TOLERANCE, "a missing rank must show"
    assert worst(expected[:1], answers(TileGroup(), sharp_run, files[:1], 1)) <= TOLERANCE


def test_slide_norm_keeps_to_the_tolerance(world: GetWorld, tmp_path: Path, real_slide: Path) -> None:
    """It divides by what tiles differ in, which may amplify rounding; and the encoder has BatchNorm."""
    folder = write_run(tmp_path / "r", encoder="test_resnet", slide_norm=True)
    files = [NamedFile("real", real_slide)]
    expected = answers(TileGroup(), folder, files, 64)
    for chunk in (7, 64):
        assert worst(expected, world(2).run(answers, folder, files, chunk)[0]) <= TOLERANCE


def test_predictions_are_those_of_the_run(trained_run: Path, demo_manifest: Path, tmp_path: Path) -> None:
    """From a manifest without labels."""
    rows = read_csv(demo_manifest)
    unlabelled = demo_manifest.parent / "unlabelled.csv"
    with unlabelled.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "slide_id"), *((row["path"], row["slide_id"]) for row in rows)])
    out = tmp_path / "new" / "p.csv"
    predict_slides(PredictRequest(run=trained_run, manifest=unlabelled, out=out, chunk=7))
    unlabelled.unlink()
    found = {row["slide_id"]: row for row in read_csv(out)}
    assert list(found) == [row["slide_id"] for row in rows]
    own = read_csv(trained_run / "predictions.csv")
    assert own
    for row in own:
        assert list(found[row["slide_id"]]) == ["slide_id", "path", "probability_mutant", "k"]
        assert found[row["slide_id"]]["k"] == row["k"]
        assert float(found[row["slide_id"]]["probability_mutant"]) == pytest.approx(
            float(row["probability_mutant"]), abs=TOLERANCE
        )


def test_three_classes(sharp_run: Path, demo_manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "three"
    shutil.copytree(sharp_run, folder)
    model = make_model(load_run(sharp_run, CPU).config, classes=3, bf16=False, kernels="torch")
    strategy = SingleStrategy(model, torch.optim.SGD(model.parameters(), lr=0.1), None, device=CPU, clip=0)
    write_weights(strategy, folder / WEIGHTS, {"epoch": "1", "step": "1"}, main=True)
    subject = {"classes": ["a", "b", "c"], "objective": CrossEntropy((), 3).record()}
    change_json(folder / "config.json", lambda content: content.update(subject))
    slide = demo_manifest.parent / read_csv(demo_manifest)[0]["path"]
    predict_slides(PredictRequest(run=folder, slides=(slide,), out=tmp_path / "p.csv"))
    (row,) = read_csv(tmp_path / "p.csv")
    assert list(row) == ["slide_id", "path", "probability_a", "probability_b", "probability_c", "k"]
    assert sum(float(row[f"probability_{name}"]) for name in "abc") == pytest.approx(1, abs=1e-5)


@pytest.fixture
def with_bad_slides(cohort_copy: Path) -> Path:
    """Four slides: one damaged inside, one that is no slide, one that is not there, and a good one last."""
    edit_manifest(cohort_copy, lambda rows: rows[:4])
    folder = cohort_copy.parent / "slides"
    damage(folder / "slide-000.svs")
    (folder / "slide-001.svs").write_bytes(b"nothing")
    (folder / "slide-002.svs").unlink()
    return cohort_copy


def test_a_slide_that_fails_is_told_and_the_others_written(
    world: GetWorld, sharp_run: Path, with_bad_slides: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.csv"
    with pytest.raises(UserError, match="3 of 4 slides failed") as caught:
        predict_slides(PredictRequest(run=sharp_run, manifest=with_bad_slides, out=out))
    for line in ("slide-000: .*cannot read at", "slide-001: cannot open", "slide-002: cannot open"):
        assert caught.match(line)
    assert [row["slide_id"] for row in read_csv(out)] == ["slide-003"]
    files = read_files(with_bad_slides, make_config(with_bad_slides, tmp_path).data)
    both = world(2).run(answers, sharp_run, files, 64)
    assert [type(each) for each in both[0]] == [str, str, str, tuple]
    assert both[0][:3] == both[1][:3], "ranks agree, also where one alone has met the damage"


def test_torchrun(sharp_run: Path, with_bad_slides: Path, tmp_path: Path) -> None:
    """As users type it, on two ranks: the good slide is written, the bad ones are told once, and the status says so."""
    out = tmp_path / "p.csv"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
    ]
    words = [
        "predict",
        str(sharp_run),
        "--manifest",
        str(with_bad_slides),
        "--out",
        str(out),
        "--heatmaps",
        str(tmp_path / "h"),
    ]
    done = subprocess.run(
        [*launcher, "-m", "slidescale.engine.commands.cli", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: 3 of 4 slides failed") == 1, done.stderr
    (row,) = read_csv(out)
    alone = answers(TileGroup(), sharp_run, [NamedFile("slide-003", Path(row["path"]))], 64)
    assert float(row["probability_mutant"]) == pytest.approx(float(alone[0][0][1]), abs=TOLERANCE)
    assert sorted(path.name for path in (tmp_path / "h").iterdir()) == [
        f"slide-003_attention{ending}" for ending in (".geojson", ".png", ".tif")
    ]


# ---- (d) what is written


def no_slide(self: Predictor, files: list[NamedFile]) -> Iterator[SlidePrediction | Failure]:
    raise AssertionError("no slide may be read")


@pytest.mark.parametrize("out", ["folder", "file/p.csv"])
def test_a_place_that_cannot_be_written_is_told_before_any_work(
    sharp_run: Path, real_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(Predictor, "predict", no_slide)
    with pytest.raises(UserError, match=f"cannot write .*{out}"):
        predict_slides(PredictRequest(run=sharp_run, slides=(real_slide,), out=tmp_path / out))
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_an_interruption_loses_no_slide(
    sharp_run: Path, demo_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = tmp_path / "p.csv", Predictor.predict
    written: list[int] = []

    def interrupted(self: Predictor, files: list[NamedFile]) -> Iterator[SlidePrediction | Failure]:
        for answer in original(self, files[:2]):
            written.append(len(read_csv(out)))
            yield answer
        written.append(len(read_csv(out)))
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_slides(PredictRequest(run=sharp_run, manifest=demo_manifest, out=out))
    assert written == [0, 1, 2]
    assert len(read_csv(out)) == 2


def trouble_of_a_full_disk(group: TileGroup, folder: Path, files: list[NamedFile], out: Path) -> str | None:
    """Where the table of one slide is still written, and that of two is not."""
    mesh = Mesh() if group.size == 1 else equivalence._mesh(group.size)
    predictor = Predictor(load_run(folder, CPU), ComputeSettings(), mesh, CPU)

    def write(path: Path, header: Iterable[str], rows: list[Any]) -> None:
        if len(rows) > 1:
            raise OSError(28, "No space left on device")
        write_csv(path, header, rows)

    with mock.patch.object(predict_module, "write_csv", write):
        try:
            predict_with(predictor, PredictRequest(run=folder, slides=tuple(file.path for file in files), out=out))
        except UserError as error:
            return str(error)
    return None


def test_every_rank_hears_of_a_full_disk(world: GetWorld, sharp_run: Path, demo_manifest: Path, tmp_path: Path) -> None:
    """Or the others would wait for the main one for ever."""
    files = read_files(demo_manifest, make_config(demo_manifest, tmp_path).data)[:3]
    alone, both = tmp_path / "1.csv", tmp_path / "2.csv"
    assert "No space left" in str(trouble_of_a_full_disk(TileGroup(), sharp_run, files, alone))
    told = world(2).run(trouble_of_a_full_disk, sharp_run, files, both)
    assert [f"cannot write {both}: [Errno 28] No space left on device"] * 2 == told
    assert [row["slide_id"] for row in read_csv(alone)] == [row["slide_id"] for row in read_csv(both)] == ["slide-000"]


def test_heatmaps_that_cannot_be_written_cost_no_prediction(sharp_run: Path, real_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "maps" / f"{real_slide.stem}_attention.png").mkdir(parents=True)
    request = PredictRequest(run=sharp_run, slides=(real_slide,), out=tmp_path / "p.csv", heatmaps=tmp_path / "maps")
    with pytest.raises(UserError, match=f"1 of 1 slides failed:\n  {real_slide.stem}: no heatmap: .*is a folder"):
        predict_slides(request)
    assert len(read_csv(tmp_path / "p.csv")) == 1


def test_nothing_is_written_over_what_is_not_a_table_of_predictions(
    sharp_run: Path, cohort_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs under any name, files of the run, tables of the user's, links and devices stay as they are."""
    (tmp_path / "mine.csv").write_text("slide,label\n")
    (tmp_path / "link.csv").symlink_to(cohort_copy)
    (tmp_path / "hard.csv").hardlink_to(cohort_copy)
    (tmp_path / "own_metrics.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Predictor, "predict", no_slide)
    slide = cohort_copy.parent / read_csv(cohort_copy)[0]["path"]
    places = {
        cohort_copy: "is an input",
        slide: "is an input",
        tmp_path / "hard.csv": "is an input",
        sharp_run / "config.json": "is an input",
        sharp_run / "model.safetensors": "is an input",
        tmp_path / "mine.csv": "is no such result",
        tmp_path / "own.csv": "is no such result",
        tmp_path / "link.csv": "symbolic link",
        tmp_path / "pipe": "device",
        Path("/dev/null"): "device",
    }
    before = {path: path.read_bytes() for path in places if path.is_file()}
    for out, reason in places.items():
        with pytest.raises(UserError, match=f"cannot write {out}: .*{reason}"):
            predict_slides(PredictRequest(run=sharp_run, manifest=cohort_copy, out=out))
    assert before == {path: path.read_bytes() for path in places if path.is_file()}
    (tmp_path / "maps").touch()
    with pytest.raises(UserError, match="cannot write .*maps"):
        predict_slides(
            PredictRequest(run=sharp_run, manifest=cohort_copy, out=tmp_path / "p.csv", heatmaps=tmp_path / "maps")
        )


# ---- (e) slides with labels


def test_metrics_of_labelled_slides(
    trained_run: Path, demo_manifest: Path, cohort_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the run's validation slides they are the run's own; splits are not needed."""

    def only_val(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{key: row[key] for key in row if key != "split"} for row in rows if row["split"] == "val"]

    edit_manifest(cohort_copy, only_val)
    with caplog.at_level("INFO"):
        predict_slides(PredictRequest(run=trained_run, manifest=cohort_copy, out=tmp_path / "p.csv"))
    found = json.loads((tmp_path / "p_metrics.json").read_text())
    own = json.loads((trained_run / "metrics.json").read_text())
    slides = len(read_csv(cohort_copy))
    assert (found["split"], found["in_train_or_val"]) == ("external", slides), "by their names, wherever they are now"
    assert found["positive_class"] == own["positive_class"] == "mutant"
    assert found["values"].keys() == own["values"].keys()
    for name, estimate in own["values"].items():
        assert found["values"][name]["value"] == (
            None if estimate["value"] is None else pytest.approx(estimate["value"], abs=1e-4)
        )
    figures = {path.name for path in (tmp_path / "p_figures").iterdir()}
    assert figures == {path.name for path in (trained_run / "figures").iterdir()}
    line = next(message for message in caplog.messages if message.startswith("auroc"))
    assert "of mutant, of" in line and "p_metrics.json" in line
    assert f"of these slides, {slides} are in split val of this run itself" in caplog.text

    predict_slides(PredictRequest(run=trained_run, manifest=demo_manifest, out=tmp_path / "all.csv"))
    assert f" are in split train and {slides} are in split val of this run itself" in caplog.text
    seen = sum(row["split"] in ("train", "val") for row in read_csv(demo_manifest))
    assert json.loads((tmp_path / "all_metrics.json").read_text())["in_train_or_val"] == seen
    caplog.clear()
    edit_manifest(cohort_copy, lambda rows: [row | {"slide_id": f"other-{row['slide_id']}"} for row in rows])
    predict_slides(PredictRequest(run=trained_run, manifest=cohort_copy, out=tmp_path / "p.csv"))
    assert "of this run itself" not in caplog.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row, at: {key: row[key] for key in ("slide_id", "path")}, "has no column 'label'"),
        (lambda row, at: row | {"label": "NA"}, "have no label of the run's (row 2: has no label)"),
        (lambda row, at: row | {"label": "mutent"}, "(row 2: label 'mutent' is not among"),
    ],
)
def test_slides_without_labels_have_no_metrics(
    sharp_run: Path,
    cohort_copy: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, str], int], dict[str, str]],
    told: str,
) -> None:
    edit_manifest(cohort_copy, lambda rows: [change(row, at) for at, row in enumerate(rows[:2])])
    with caplog.at_level("INFO"):
        predict_slides(PredictRequest(run=sharp_run, manifest=cohort_copy, out=tmp_path / "p.csv"))
    assert "predictions without metrics: " in caplog.text
    assert told in caplog.text
    assert [path.name for path in tmp_path.glob("p*")] == ["p.csv"]
    assert len(read_csv(tmp_path / "p.csv")) == 2


def test_a_slide_without_a_label_costs_only_its_own_metrics(
    sharp_run: Path, cohort_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = ["wild_type", "mutant", "", "mutent", "wild_type", "NA"]
    edit_manifest(cohort_copy, lambda rows: [row | {"label": labels[at]} for at, row in enumerate(rows[:6])])
    with caplog.at_level("INFO"):
        predict_slides(PredictRequest(run=sharp_run, manifest=cohort_copy, out=tmp_path / "p.csv"))
    assert "metrics without the slides that are not labelled: 3 of 6 slides of " in caplog.text
    assert "(row 4: has no label)" in caplog.text and "of 3 slides of" in caplog.text
    assert len(read_csv(tmp_path / "p.csv")) == 6
    assert json.loads((tmp_path / "p_metrics.json").read_text())["values"]["auroc"]["value"] is not None


# ---- (f) a frozen encoder


def test_a_frozen_encoder_whose_file_has_moved(demo_manifest: Path, tmp_path: Path) -> None:
    weights = test_frozen.write_weights(tmp_path / "weights.pth")
    folder = main.run(test_frozen.make_config(demo_manifest, tmp_path, weights))
    before = load_run(folder, CPU).model.state_dict()
    moved = weights.rename(tmp_path / "moved.pth")
    with pytest.raises(UserError, match="whose weights are not in .*weights.pth: name their file by --weights"):
        load_run(folder, CPU)
    slide = demo_manifest.parent / "slides" / "slide-000.svs"
    predict_slides(PredictRequest(run=folder, slides=(slide,), out=tmp_path / "p.csv", weights=moved))
    assert len(read_csv(tmp_path / "p.csv")) == 1
    found = load_run(folder, CPU, encoder_weights=moved).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    other = test_frozen.write_weights(tmp_path / "other.pth", seed=2)
    with pytest.raises(UserError, match="of other weights than .*other.pth has now"):
        load_run(folder, CPU, encoder_weights=other)


def test_weights_for_an_encoder_that_has_its_own(sharp_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--weights is .*: the encoder of .* is not frozen"):
        load_run(sharp_run, CPU, encoder_weights=tmp_path / "weights.pth")


# ---- (g) what is asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name the slides"),
        ({"slides": (Path("a"),), "manifest": Path("b")}, "name the slides"),
        ({"slides": (Path("a"),), "chunk": 0}, "--chunk is 0"),
        ({"slides": (Path("a"),), "readers": 0}, "--readers is 0"),
        ({"slides": (Path("a"),), "default_mpp_um": -1.0}, "--default-mpp-um is -1"),
    ],
)
def test_requests_without_a_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PredictRequest(run=Path("r"), **settings)


def test_files_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several files are called s; give them names in a --manifest"):
        name_files([Path("a/s.svs"), Path("b/s.svs"), Path("t.svs")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,file\na,b\n", r"no column 'path' \(as in the run's manifest\). It has: slide_id, file"),
        ("slide_id,path\n", "a header and no rows"),
        (
            "slide_id,path\na,b\n,c\na,\n",
            "row 3: slide_id is empty\n  row 4: path is empty\n  row 4: slide_id 'a' already .* 2",
        ),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_files(path, make_config(path, tmp_path).data)
