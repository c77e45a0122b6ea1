"""Whole runs in this process: what they write, how they resume, and what bad input does to them."""

import json
import logging
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from slidescale.engine.commands import recipe as main
from slidescale.engine.commands.predict import PredictRequest, predict_slides
from slidescale.engine.config import (
    OptimConfig,
)
from slidescale.engine.errors import TrainingError, UserError
from slidescale.engine.strategies.strategy import GradientNorms, SingleStrategy
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.history import EpochTotals
from slidescale.engine.training.trainer import Trainer

from support.grids import full
from support.runs import make_config, weights_in
from support.slides import Away, damage
from support.tables import edit_manifest, read_csv


def test_what_a_run_leaves(demo_manifest: Path, trained_run: Path) -> None:
    folder = trained_run
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["data"]["k"] == 12
    assert record["versions"]["torch"] == version("torch")
    assert record["commit"]
    val = [row for row in read_csv(demo_manifest) if row["split"] == "val"]
    predictions = read_csv(folder / "predictions.csv")
    assert [row["slide_id"] for row in predictions] == [row["slide_id"] for row in val]
    assert all(0 < float(row["probability_mutant"]) < 1 for row in predictions)
    assert all(int(row["k"]) > 100 for row in predictions), "validation uses all tissue tiles, not k"
    assert len(list((folder / "heatmaps").glob("*.png"))) == 2
    links = {name: (folder / "checkpoints" / name).resolve().name for name in ("best", "last")}
    assert links["last"] == "epoch-0002"
    assert {path.name for path in (folder / "checkpoints").glob("epoch-*")} == {"epoch-0001", "epoch-0002"}
    board = EventAccumulator(str(folder)).Reload()
    tags = set(board.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/gradient_norm", "epoch/train_loss", "epoch/val_loss"} <= tags
    assert {"epoch/val_auroc", "speed/tiles_per_s", "speed/data_wait_share", "speed/peak_gib"} <= tags
    assert {"val/auroc", "val/balanced_accuracy"} <= tags
    images = board.Tags()["images"]
    assert sum(name.startswith("attention/") for name in images) == 2
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert figures == {name.removeprefix("figures/") for name in images if name.startswith("figures/")}
    assert {"roc", "confusion"} <= figures
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["headline"]["metric"] == "auroc"
    assert set(metrics["values"]["auroc"]) == {"value", "low", "high"}
    assert not (folder / "excluded.csv").exists()


def test_classes_and_what_metrics_are_of_are_told(
    cohort_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without --data.classes they are sorted; without a val split no epoch is chosen. Both are told."""
    with caplog.at_level(logging.INFO):
        folder = main.run(make_config(cohort_copy, tmp_path / "sorted", epochs=1, classes=()))
    assert "classes: mutant, wild_type (" in caplog.text and "AUROC are those of wild_type" in caplog.text
    assert "no epoch can be chosen" not in caplog.text
    assert "probability_wild_type" in read_csv(folder / "predictions.csv")[0]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["positive_class"] == "wild_type"
    assert (metrics["split"], metrics["epoch_chosen_on_this_split"]) == ("val", True)
    caplog.clear()
    edit_manifest(cohort_copy, lambda rows: [row | {"split": "train"} for row in rows])
    with caplog.at_level(logging.INFO):
        main.run(make_config(cohort_copy, tmp_path / "train", epochs=2))
    assert caplog.text.count("no slide is in split 'val': no epoch can be chosen") == 1
    assert (tmp_path / "train" / "t" / "checkpoints" / "best").resolve().name == "epoch-0002"


@pytest.mark.parametrize("name", ["predictions.csv", "figures", *full("metrics.json", "heatmaps")])
def test_a_result_that_cannot_be_written_does_not_end_the_run(
    demo_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Something else stands where it is to be written, in the first epoch already; the rest is there."""
    original = Trainer._train_epoch

    def block(self: Trainer, epoch: int, step: int) -> Any:
        path = self.folder / name
        path.touch() if "." not in name else path.mkdir(exist_ok=True)
        return original(self, epoch, step)

    monkeypatch.setattr(Trainer, "_train_epoch", block)
    folder = main.run(make_config(demo_manifest, tmp_path))
    assert f"cannot write {folder / name}" in caplog.text
    assert (folder / "checkpoints" / "last").resolve().name == "epoch-0002"
    others = {"predictions.csv", "metrics.json", "figures/roc.png", "history.csv"} - {name, f"{name}/roc.png"}
    assert all((folder / other).is_file() for other in others)
    assert not list(folder.glob("*.tmp"))


def test_frozen_start_and_half_the_slides_an_epoch(demo_manifest: Path, tmp_path: Path) -> None:
    """The schedule's length, the curves and a resume follow from the shorter epochs."""
    optim = OptimConfig(encoder_frozen_epochs=1, warmup_epochs=0.5, weight_decay=0.04, weight_decay_end=0.4)
    slides = sum(row["split"] == "train" for row in read_csv(demo_manifest))
    config = make_config(demo_manifest, tmp_path, epochs=3, optim=optim)
    config = replace(config, data=replace(config.data, epoch_share=0.5))
    steps = round(slides / 2)
    assert steps < slides
    folder = main.run(config)
    board = EventAccumulator(str(folder)).Reload()
    scalars = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"]}
    every = list(range(1, 3 * steps + 1))
    assert [event.step for event in scalars["train/loss"]] == every
    assert [event.step for event in scalars["train/gradient_norm_encoder"]] == every[steps:], "not while it is frozen"
    rates = [event.value for event in scalars["train/learning_rate_encoder"]]
    assert not any(rates[:steps]) and all(rates[steps:])
    decays = [event.value for event in scalars["train/weight_decay"]]
    assert decays[0] == pytest.approx(0.04) and decays == sorted(decays) and 0.3 < decays[-1] < 0.4
    assert all(0 < event.value <= 1 for event in scalars["train/attention_entropy"])
    assert all(1 <= event.value <= 12.001 for event in scalars["train/effective_tiles"]), "of data.k tiles, 12"
    names = {
        info.name.tag
        for info in metadata.parse_experiment_plugin_data(
            board.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
        ).metric_infos
    }
    assert names and names <= set(scalars), "what runs are compared by is there"


def test_a_taken_name_gets_a_number(demo_manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "precious").touch()
    assert main.run(make_config(demo_manifest, tmp_path, epochs=1)) == tmp_path / "t-2"
    assert list((tmp_path / "t").iterdir()) == [tmp_path / "t" / "precious"]


def test_unusable_slides_are_set_aside(cohort_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One file cut short, one damaged inside (found only when its tiles are read), one that is empty glass."""
    rows = read_csv(cohort_copy)
    train = [row for row in rows if row["split"] == "train"]
    val = [row for row in rows if row["split"] == "val"]
    cut = cohort_copy.parent / train[0]["path"]
    cut.write_bytes(cut.read_bytes()[:1000])
    damage(cohort_copy.parent / train[1]["path"])
    damage(cohort_copy.parent / val[0]["path"])
    folder = main.run(make_config(cohort_copy, tmp_path / "runs"))
    excluded = {row["slide_id"]: row["reason"] for row in read_csv(folder / "excluded.csv")}
    assert set(excluded) == {train[0]["slide_id"], train[1]["slide_id"], val[0]["slide_id"]}
    assert "cannot open" in excluded[train[0]["slide_id"]]
    assert "cannot read at" in excluded[train[1]["slide_id"]]
    assert val[0]["slide_id"] not in {row["slide_id"] for row in read_csv(folder / "predictions.csv")}


def test_a_slide_that_was_away_for_an_epoch_is_back_in_the_next(
    cohort_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the checkpoint of the epoch without it does not have it as unusable."""
    lost = next(row for row in read_csv(cohort_copy) if row["split"] == "train")
    train_epoch, slides, kept = Trainer._train_epoch, [], []

    def with_faults(trainer: Trainer, epoch: int, step: int) -> EpochTotals:
        with pytest.MonkeyPatch.context() as patch:
            if epoch == 0:
                Away(patch, cohort_copy.parent / lost["path"], 10**6)
            totals = train_epoch(trainer, epoch, step)
        slides.append(len(trainer.cohort.usable("train")))
        kept.append(trainer.cohort.lasting)
        return totals

    monkeypatch.setattr(Trainer, "_train_epoch", with_faults)
    with caplog.at_level("INFO"):
        folder = main.run(make_config(cohort_copy, tmp_path / "runs"))
    assert slides[1] == slides[0] + 1 and kept == [{}, {}]
    assert "now, in 3 tries: Input/output error" in caplog.text and "is tried again" in caplog.text
    assert read_csv(folder / "excluded.csv") == []


def test_names_lead_out_of_no_folder(cohort_copy: Path, tmp_path: Path) -> None:
    """Whatever slides, patients and classes are called, a run and what predicts with it keep to their folders."""
    names = ["../../../escaped", str(tmp_path / "absolute"), "H21/1234", "a" * 300, "病" * 100, "=1+1"]
    classes = {"wild_type": "../wild", "mutant": "EGFR+/L858R"}

    def rename(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        val = [row for row in rows if row["split"] == "val"]
        for row, name in zip(rows, [*names[:2], *["x"] * len(rows)], strict=False):
            row["case_id"] = f"{name}{row['case_id']}"
        for row, name in zip(val, names, strict=False):
            row["slide_id"] = name
        for row in rows:
            row["label"] = classes[row["label"]]
        return rows

    edit_manifest(cohort_copy, rename)
    before = set(tmp_path.rglob("*"))
    val = [row for row in read_csv(cohort_copy) if row["split"] == "val"]
    config = make_config(cohort_copy, tmp_path / "runs" / "deep", epochs=1, heatmaps=9, classes=tuple(classes.values()))
    folder = main.run(config)
    request = PredictRequest(
        run=folder, manifest=cohort_copy, out=tmp_path / "o" / "p.csv", heatmaps=tmp_path / "o" / "h"
    )
    edit_manifest(cohort_copy, lambda rows: [row for row in rows if row["split"] == "val"])
    predict_slides(request)
    assert len(list((folder / "heatmaps").iterdir())) == len(val)
    assert len(list((tmp_path / "o" / "h").glob("*.png"))) == len(val)
    outside = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert outside == {"runs", "o"} and not (tmp_path.parent / "escaped").exists()
    assert {path.name for path in (tmp_path / "runs" / "deep").iterdir()} == {"t", "tilings"}


def test_too_many_unusable_slides_stop_the_run(cohort_copy: Path, tmp_path: Path) -> None:
    for row in read_csv(cohort_copy)[:4]:
        (cohort_copy.parent / row["path"]).write_bytes(b"")
    with pytest.raises(UserError, match="4 of 12 slides are unusable, more than the share --data.max-excluded 0.25"):
        main.run(make_config(cohort_copy, tmp_path / "runs"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite(demo_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The slide is named, no step is taken, and the last checkpoint is as it was."""
    original = CrossEntropy.forward
    calls = {"n": 0}
    steps_an_epoch = sum(row["split"] == "train" for row in read_csv(demo_manifest))

    def forward(self: CrossEntropy, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = original(self, logits, target)
        if not torch.is_grad_enabled():
            return loss
        calls["n"] += 1
        if calls["n"] <= steps_an_epoch + 1:
            return loss
        if what == "loss":
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss

    monkeypatch.setattr(CrossEntropy, "forward", forward)
    with pytest.raises(TrainingError, match=rf"slide slide-\d+.*{what}.*no optimizer step was taken"):
        main.run(make_config(demo_manifest, tmp_path))
    checkpoint = tmp_path / "t" / "checkpoints" / "last"
    assert checkpoint.resolve().name == "epoch-0001"
    assert all(value.isfinite().all() for value in weights_in(tmp_path / "t").values())


def test_weights_that_are_not_finite_are_no_checkpoint(
    cohort_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of an epoch spoils them; nothing else looks at them, for there is no validation split."""
    edit_manifest(cohort_copy, lambda rows: [row | {"split": "train"} for row in rows])
    config = make_config(cohort_copy, tmp_path)
    original, calls = SingleStrategy.step, []

    def step(self: SingleStrategy) -> GradientNorms:
        norms = original(self)
        calls.append(norms)
        if len(calls) == 24:
            next(self.model.aggregator.parameters()).data[0] = torch.nan
        return norms

    with monkeypatch.context() as patch:
        patch.setattr(SingleStrategy, "step", step)
        message = r"after step 24, on slide slide-\d+: aggregator\.\S+ has values that are not finite: no checkpoint"
        with pytest.raises(TrainingError, match=message):
            main.run(config)
    folder = tmp_path / "t"
    links = {name: (folder / "checkpoints" / name).resolve().name for name in ("best", "last")}
    assert links == {"best": "epoch-0001", "last": "epoch-0001"}
    main.run(replace(config, resume=True))
    assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())


def test_real_slide_beside_drawn_ones(cohort_copy: Path, real_slide: Path, tmp_path: Path) -> None:
    shutil.copy(real_slide, cohort_copy.parent / "slides" / "real.svs")
    row = {"slide_id": "real", "case_id": "real", "path": "slides/real.svs", "label": "mutant"}
    edit_manifest(cohort_copy, lambda rows: [*rows, row | {"split": "val"}])
    folder = main.run(make_config(cohort_copy, tmp_path / "runs", epochs=1))
    predicted = {row["slide_id"]: row for row in read_csv(folder / "predictions.csv")}
    assert int(predicted["real"]["k"]) > 500


def test_test_split_is_predicted_by_the_best_epoch(cohort_copy: Path, tmp_path: Path) -> None:
    def move(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        cases = sorted({row["case_id"] for row in rows if row["split"] == "val"})
        return [row | {"split": "test"} if row["case_id"] in cases[::2] else row for row in rows]

    edit_manifest(cohort_copy, move)
    folder = main.run(make_config(cohort_copy, tmp_path / "runs", epochs=1))
    tested = [row["slide_id"] for row in read_csv(cohort_copy) if row["split"] == "test"]
    assert tested
    assert [row["slide_id"] for row in read_csv(folder / "predictions_test.csv")] == tested
    metrics = json.loads((folder / "metrics_test.json").read_text())
    assert metrics["headline"]["metric"] == "auroc"
    assert (metrics["split"], metrics["epoch_chosen_on_this_split"]) == ("test", False)
    assert list((folder / "figures_test").glob("*.png"))


def test_three_classes(cohort_copy: Path, tmp_path: Path) -> None:
    def relabel(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [row | {"label": "abc"[index % 3]} for index, row in enumerate(rows)]

    edit_manifest(cohort_copy, relabel)
    config = make_config(
        cohort_copy, tmp_path / "runs", epochs=1, classes=(), optim=OptimConfig(class_weights=(1, 2, 3))
    )
    predictions = read_csv(main.run(config) / "predictions.csv")
    total = [sum(float(row[f"probability_{name}"]) for name in "abc") for row in predictions]
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_class_weights_of_inferred_classes(demo_manifest: Path, tmp_path: Path) -> None:
    config = make_config(demo_manifest, tmp_path, classes=(), optim=OptimConfig(class_weights=(1, 2, 3)))
    with pytest.raises(UserError, match=r"--optim.class-weights has 3 values for 2 classes"):
        main.run(config)
