"""What a run leaves is enough to predict with: its weights under every strategy, on any ranks, in any chunks."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from slidescale.engine.commands import predict as predict_module
from slidescale.engine.commands.predict import (
    ComputeSettings,
    Failure,
    Predictor,
    PredictRequest,
    name_files,
    predict_slides,
    predict_with,
)
from slidescale.engine.commands.trained import load_run
from slidescale.engine.data.manifest import NamedFile, read_files
from slidescale.engine.errors import ConfigError, ManifestError, UserError
from slidescale.engine.files import write_csv
from slidescale.engine.models.make import make_model
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.strategy import SingleStrategy
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.weights import WEIGHTS, write_weights

from support import equivalence
from support.faults import dropped_merge_term
from support.runs import CPU, change_json, make_config, write_run
from support.slides import damage
from support.tables import edit_manifest, read_csv
from support.worlds import World, free_port

GetWorld = Callable[..., World]

# fp32 rounds to 6e-8 of a value at each of some tens of layers, in an order that batch sizes and ranks change.
TOLERANCE = 1e-5


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
    unlabelled = tmp_path / "unlabelled.csv"
    with unlabelled.open("w", newline="") as file:
        writer = csv.writer(file)
        places = [(demo_manifest.parent / row["path"], row["slide_id"]) for row in rows]
        writer.writerows([("path", "slide_id"), *places])
    out = tmp_path / "new" / "p.csv"
    predict_slides(PredictRequest(run=trained_run, manifest=unlabelled, out=out, chunk=7))
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
