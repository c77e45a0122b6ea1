"""Runs with each kind of supervision: what they write, and what they refuse."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slidescale.engine.commands import recipe as main
from slidescale.engine.commands.predict import PredictRequest, predict_slides
from slidescale.engine.config import Config, OptimConfig
from slidescale.engine.errors import ConfigError, UserError

from support.runs import make_config
from support.tables import edit_manifest, read_csv


def put_targets(manifest: Path) -> None:
    """Targets of every kind, in columns of their own, that go with the class and the row."""

    def change(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        for index, row in enumerate(rows):
            mutant = row["label"] == "mutant"
            row["grade"] = str(1 + 2 * mutant + index % 3)
            row["ER"] = "" if index % 5 == 0 else str(int(mutant))
            row["PR"] = str(index % 2)
            row["age"] = str(1000 + 10 * mutant + index % 4)
            row["months"], row["dead"] = str(3 + 7 * index % 11 + (0 if mutant else 9)), str(int(index % 4 > 0))
        return rows

    edit_manifest(manifest, change)


def config_of(kind: str, manifest: Path, out: Path, **changes: Any) -> Config:
    config = make_config(manifest, out, **({"epochs": 1, "heatmaps": 1} | changes))
    settings: dict[str, Any] = {
        "ordinal": {"label_column": "grade"},
        "multi_label": {"label_columns": ("ER", "PR")},
        "regression": {"label_column": "age"},
        "survival": {"label_column": "months", "event_column": "dead", "survival_bins": 2},
    }[kind]
    return replace(config, data=replace(config.data, supervision=kind, classes=(), **settings))


@pytest.mark.parametrize(
    ("kind", "targets", "outputs", "headline"),
    [
        ("ordinal", ["label"], [f"probability_{grade}" for grade in range(1, 6)], "quadratic_kappa"),
        ("multi_label", ["label_ER", "label_PR"], ["probability_ER", "probability_PR"], "auroc"),
        ("regression", ["target"], ["prediction"], "r2"),
        ("survival", ["time", "event"], ["risk"], "concordance"),
    ],
)
def test_runs(
    cohort_copy: Path, tmp_path: Path, kind: str, targets: list[str], outputs: list[str], headline: str
) -> None:
    put_targets(cohort_copy)
    folder = main.run(config_of(kind, cohort_copy, tmp_path / "runs"))
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["slide_id", "case_id", *targets, *outputs, "k"]
    rows = read_csv(folder / "predictions.csv")
    val = [row for row in read_csv(cohort_copy) if row["split"] == "val"]
    assert [row["slide_id"] for row in rows] == [row["slide_id"] for row in val]
    columns = {"label_ER": "ER", "label_PR": "PR", "label": "grade", "target": "age", "time": "months", "event": "dead"}
    for row, manifest_row in zip(rows, val, strict=True):
        assert [row[name] and float(row[name]) for name in targets] == [
            manifest_row[columns[name]] and float(manifest_row[columns[name]]) for name in targets
        ]
        assert all(math.isfinite(float(row[name])) for name in outputs)
    record = json.loads((folder / "config.json").read_text())
    assert record["objective"]["supervision"] == kind
    train = [row for row in read_csv(cohort_copy) if row["split"] == "train"]
    if kind == "regression":
        ages = [float(row["age"]) for row in train]
        assert record["objective"]["mean"] == pytest.approx(np.mean(ages))
        assert all(abs(float(row["prediction"]) - np.mean(ages)) < 50 for row in rows), "in years"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["headline"]["metric"] == headline
    assert metrics["values"][headline]["value"] == metrics["headline"]["value"]
    assert list((folder / "figures").glob("*.png"))
    edit_manifest(cohort_copy, lambda rows: [row for row in rows if row["split"] == "val"])
    predict_slides(PredictRequest(run=folder, manifest=cohort_copy, out=tmp_path / "p.csv"))
    again = json.loads((tmp_path / "p_metrics.json").read_text())
    assert again["headline"]["value"] == pytest.approx(metrics["headline"]["value"], abs=1e-4)
    first = min(val, key=lambda row: row["grade"]) if kind == "ordinal" else val[0]
    stem = f"{first['slide_id']}_{first['grade']}" if kind == "ordinal" else first["slide_id"]
    assert [path.stem for path in (folder / "heatmaps").glob("*.png")] == [stem]


def test_a_resumed_run_keeps_its_scale_and_its_classes(cohort_copy: Path, tmp_path: Path) -> None:
    """Where nothing shows that the manifest has changed, the logits must go on meaning the same."""
    put_targets(cohort_copy)
    folder = main.run(config_of("regression", cohort_copy, tmp_path / "runs"))
    (folder / "slides.json").unlink()  # as an earlier version left it
    before = json.loads((folder / "config.json").read_text())["objective"]
    edit_manifest(cohort_copy, lambda rows: [row | {"age": str(2 * float(row["age"]))} for row in rows])
    config = config_of("regression", cohort_copy, tmp_path / "runs", epochs=2, resume=True)
    assert main.run(config) == folder
    assert json.loads((folder / "config.json").read_text())["objective"] == before

    inferred = make_config(cohort_copy, tmp_path / "classes", epochs=1, classes=())
    main.run(inferred)
    edit_manifest(
        cohort_copy, lambda rows: [row | {"label": row["label"].replace("mutant", "changed")} for row in rows]
    )
    with pytest.raises(UserError, match="was begun to predict mutant, wild_type, and the manifest has changed, wild_t"):
        main.run(replace(inferred, resume=True))


def test_what_a_supervision_cannot_have(cohort_copy: Path, tmp_path: Path) -> None:
    put_targets(cohort_copy)
    weights = OptimConfig(class_weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match="class-weights .*classes, ordinal and multi_label, and that is survival"):
        main.run(config_of("survival", cohort_copy, tmp_path, optim=weights))
    with pytest.raises(ConfigError, match="censored-alpha is 0.4: is for --data.supervision survival"):
        main.run(config_of("multi_label", cohort_copy, tmp_path, optim=OptimConfig(censored_alpha=0.4)))
    three = OptimConfig(class_weights=(1.0, 2.0, 3.0))
    with pytest.raises(ConfigError, match="3 values for 2 labels"):
        main.run(config_of("multi_label", cohort_copy, tmp_path, optim=three))
    demo = config_of("regression", cohort_copy, tmp_path)
    with pytest.raises(ConfigError, match="regression needs --data.manifest"):
        main.run(replace(demo, data=replace(demo.data, manifest=None)))
