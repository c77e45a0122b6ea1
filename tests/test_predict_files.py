"""What predictions leave: tables, heatmaps, metrics of slides with labels; and that nothing else is written over."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slidescale.engine.commands.predict import (
    Failure,
    Predictor,
    PredictRequest,
    SlidePrediction,
    predict_slides,
)
from slidescale.engine.data.manifest import NamedFile
from slidescale.engine.errors import UserError

from support.tables import edit_manifest, read_csv


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
