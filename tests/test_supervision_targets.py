"""Targets of each kind of supervision, as a manifest has them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from slidescale.engine.config import Config, DataConfig, RunConfig
from slidescale.engine.data.manifest import read_manifest
from slidescale.engine.errors import ConfigError, ManifestError
from slidescale.engine.supervision.make import check_settings

NAN = math.nan


def write(folder: Path, columns: str, *rows: str) -> Path:
    """A manifest whose rows give the target's cells and the split."""
    manifest = folder / "m.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        file.write(f"slide_id,case_id,path,{columns},split\n")
        for index, row in enumerate(rows):
            (folder / f"{index}.svs").touch()
            file.write(f"s{index},p{index},{index}.svs,{row}\n")
    return manifest


def problems(manifest: Path, config: DataConfig) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read_manifest(manifest, config)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


LABELS = DataConfig(supervision="multi_label", label_columns=("ER", "PR"))


def test_manifest_of_labels(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, "ER,PR", "1,0,train", "0.0,1.0,train", "NA,1,val", ",0,test"), LABELS)
    assert (manifest.classes, manifest.supervision) == (("ER", "PR"), "multi_label")
    targets = np.array([row.target for row in manifest.rows])
    np.testing.assert_array_equal(targets, [[1, 0], [0, 1], [NAN, 1], [NAN, 0]])


def test_faulty_manifest_of_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "ER,PR", "1,0,train", "1,,train", ",nan,val", "yes,2,test")
    assert problems(path, LABELS) == [
        "no train slide has ER 0; there is nothing to tell apart",
        "no train slide has PR 1; there is nothing to tell apart",
        "row 4: none of ER, PR is known; leave the row out",
        "row 5: ER 'yes' is not 0 or 1; leave the cell empty where it is not known",
        "row 5: PR '2' is not 0 or 1; leave the cell empty where it is not known",
    ]
    other = DataConfig(supervision="multi_label", label_columns=("ER", "PgR"))
    with pytest.raises(ManifestError, match=r"no column 'PgR' \(--data.label-columns\), did you mean 'PR'"):
        read_manifest(path, other)


def test_manifest_of_numbers(tmp_path: Path) -> None:
    config = DataConfig(supervision="regression", label_column="age")
    manifest = read_manifest(write(tmp_path, "age", "61,train", "7e1,train", "-3.5,val"), config)
    assert manifest.classes == ("age",)
    assert [row.target for row in manifest.rows] == [(61.0,), (70.0,), (-3.5,)]
    faulty = write(tmp_path, "age", "61,train", "61.0,train", ",val", '"3,5",val', "inf,test", "nan,test")
    assert problems(faulty, config) == [
        "age of the train split: all are 61, up to a standard deviation of 0; there is nothing to predict",
        "row 4: age is empty",
        "row 5: age '3,5' is not a finite number",
        "row 6: age 'inf' is not a finite number",
        "row 7: age is missing: 'nan'",
    ]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            ["0.3", repr(0.1 + 0.2), "0.3"],
            "all are 0.3, up to a standard deviation of ",
        ),
        (["1e308", "-1e308"], "numbers are too large for a standard deviation; use another unit"),
    ],
)
def test_numbers_without_a_scale(tmp_path: Path, values: list[str], problem: str) -> None:
    """Errors are divided by the standard deviation: by 5e-17, a loss would be of 1e30."""
    config = DataConfig(supervision="regression", label_column="age")
    path = write(tmp_path, "age", *[f"{value},train" for value in values])
    (found,) = problems(path, config)
    assert found.startswith(f"age of the train split: {problem}")
    near = write(tmp_path, "age", "1000.00001,train", "1000,train")
    assert len(read_manifest(near, config).rows) == 2


def test_manifest_of_survival(tmp_path: Path) -> None:
    config = DataConfig(supervision="survival", label_column="months", event_column="dead", survival_bins=2)
    path = write(tmp_path, "months,dead", "3.5,1,train", "20,1.0,train", "7,0,val")
    manifest = read_manifest(path, config)
    assert manifest.classes == ("risk",)
    assert [row.target for row in manifest.rows] == [(3.5, 1.0), (20.0, 1.0), (7.0, 0.0)]
    faulty = write(tmp_path, "months,dead", "3,1,train", "0,0,train", "5,,val", "soon,yes,val", "-1,0,test")
    assert problems(faulty, config) == [
        "train split: 1 observed events at 1 different times do not fill 2 bins; use fewer --data.survival-bins",
        "row 3: months '0' is not a time above 0; leave the row out, or give half a unit",
        "row 4: dead is empty",
        "row 5: dead 'yes' is not 1 (observed) or 0 (censored)",
        "row 5: months 'soon' is not a time above 0; leave the row out",
        "row 6: months '-1' is not a time above 0; leave the row out",
    ]
    with pytest.raises(ManifestError, match=r"no column 'event' \(--data.event-column\)"):
        read_manifest(path, replace(config, event_column="event"))


GRADES = DataConfig(supervision="ordinal")


def test_manifest_of_grades(tmp_path: Path) -> None:
    path = write(tmp_path, "label", "10,train", "2,train", "1.5,train", "2,val")
    manifest = read_manifest(path, GRADES)
    assert manifest.classes == ("1.5", "2", "10"), "as numbers"
    assert [row.target for row in manifest.rows] == [(2.0,), (1.0,), (0.0,), (1.0,)]
    words = write(tmp_path, "label", "low,train", "high,train", "none,train")
    assert problems(words, GRADES) == [
        "labels have no order, for 'high', 'low' is no number; give them from low to high: --data.classes",
        "row 4: label is missing: 'none'",
    ]
    manifest = read_manifest(words, replace(GRADES, classes=("none", "low", "high")))
    assert [row.target for row in manifest.rows] == [(1.0,), (2.0,), (0.0,)]
    twice = write(tmp_path, "label", "1,train", "1.0,train", "2,train")
    assert problems(twice, GRADES) == [
        "labels '1', '1.0' are spellings of the same number; rename them: --data.label-map"
    ]
    assert read_manifest(twice, replace(GRADES, label_map={"1.0": "1"})).classes == ("1", "2")


def test_labels_are_renamed(tmp_path: Path) -> None:
    path = write(tmp_path, "label", "negative,train", "itc,train", "macro,val")
    config = DataConfig(classes=("negative", "tumor"), label_map={"itc": "tumor", "macro": "tumor", "micro": "tumor"})
    assert [row.target for row in read_manifest(path, config).rows] == [(0.0,), (1.0,), (1.0,)]
    assert problems(path, DataConfig(label_map={"itc": "tumor", "marco": "tumor"})) == [
        "data.label_map renames 'marco', which no row has, did you mean 'macro'?",
        "row 4: label 'macro' is not among the labels of the train split: negative, tumor",
    ]


def test_renaming_on_the_command_line() -> None:
    default = Config(run=RunConfig(name="t"))
    words = ["--data.label-map", "itc", "tumor", "micro", "tumor", "--data.tile-px", "64"]
    config = tyro.cli(Config, default=default, args=words)
    assert config.data.label_map == {"itc": "tumor", "micro": "tumor"}
    assert config.flat()["data.label_map"] == config.data.label_map
    assert default.flat()["data.label_map"] == {}, "what is compared before a resume has it in any case"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"supervision": "multi_label"}, "--data.label-columns is .*must name a column"),
        ({"supervision": "multi_label", "label_columns": ("a", "a")}, "--data.label-columns is .*distinct"),
        ({"label_columns": ("a",)}, "--data.label-columns is .*is for --data.supervision multi_label"),
        ({"supervision": "multi_label", "label_columns": ("a",), "label_column": "b"}, "--data.label-column is"),
        ({"supervision": "survival", "classes": ("a", "b")}, "--data.classes is .* for --data.supervision classes"),
        ({"supervision": "regression", "label_map": {"a": "b"}}, "--data.label-map is"),
        ({"event_column": "dead"}, "--data.event-column is .*is for --data.supervision survival"),
        ({"supervision": "regression", "survival_bins": 3}, "--data.survival-bins is"),
        ({"supervision": "survival", "survival_bins": 1}, "--data.survival-bins is 1: must be at least 2"),
    ],
)
def test_settings_of_another_supervision_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(DataConfig(**settings))
