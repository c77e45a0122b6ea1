"""Pictures of predictions: what is drawn is right, and something is drawn."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slidescale.engine.config import SupervisionName
from slidescale.engine.evaluation.class_figures import calibration, precision_recall_curves, roc_curves
from slidescale.engine.evaluation.figures import FIGURES, draw
from slidescale.engine.evaluation.metrics import measure
from slidescale.engine.evaluation.number_figures import kaplan_meier
from slidescale.engine.supervision.make import KINDS, supervision_of


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def predicted(slides: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class indices `[n, 1]`, and probabilities in twentieths."""
    draws = np.random.default_rng(0)
    labels = np.r_[np.arange(classes), draws.integers(0, classes, slides - classes)]
    seen = np.where(draws.random(slides) < 0.4, draws.integers(0, classes, slides), labels)
    parts = draws.multinomial(14, np.full(classes, 1 / classes), size=slides) + 6 * np.eye(classes, dtype=int)[seen]
    return labels[:, None].astype(float), parts / 20


def cohort(kind: SupervisionName, slides: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    labels, outputs = predicted(slides, 3)
    if kind in ("classes", "ordinal"):
        return labels, outputs, ["_first", "$second$ of a long name that has no room", "c"]
    if kind == "multi_label":
        return (
            np.where(np.arange(slides)[:, None] % 5 == 0, np.nan, np.eye(3)[labels[:, 0].astype(int)]),
            outputs,
            list("abc"),
        )
    values = labels + outputs[:, :1]
    return (
        (values, outputs[:, :1], ["value"])
        if kind == "regression"
        else (
            np.c_[values, np.arange(slides) % 3 > 0],
            outputs[:, :1],
            ["risk"],
        )
    )


def axes() -> Axes:
    return Figure().add_subplot()


PICTURES: dict[SupervisionName, set[str]] = {
    "classes": {"roc", "precision_recall", "reliability", "confusion"},
    "ordinal": {"confusion"},
    "multi_label": {"roc", "precision_recall"},
    "regression": {"scatter"},
    "survival": {"kaplan_meier"},
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_drawn(kind: SupervisionName) -> None:
    pictures = draw(kind, *cohort(kind, 53))
    assert set(pictures) == PICTURES[kind]
    for name, picture in pictures.items():
        height, width, colours = picture.shape
        assert picture.dtype == np.uint8 and colours == 3 and min(height, width) >= 400, name
        white = (picture == 255).all(2)
        assert 0.2 < white.mean() < 0.99, f"{name} is blank, or all ink"
        # Nothing is cut off at the picture's border.
        assert white[0].all() and white[-1].all() and white[:, 0].all() and white[:, -1].all(), name


def test_pictures_show_their_data() -> None:
    labels, outputs = predicted(53, 2)
    names = ["wild_type", "mutant"]
    right, wrong = draw("classes", labels, outputs, names), draw("classes", 1 - labels, outputs, names)
    for name in PICTURES["classes"]:
        assert not np.array_equal(right[name], wrong[name]), name
    again = draw("classes", labels, outputs, names)
    assert all(np.array_equal(right[name], again[name]) for name in right)


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_curves_have_the_areas_of_the_metrics(classes: int) -> None:
    labels, outputs = predicted(67, classes)
    names = [f"class {c}" for c in range(classes)]
    values = measure("classes", labels, outputs, names)
    questions = supervision_of("classes").questions(labels, outputs, names)
    rocs, precisions = roc_curves(questions, axes()), precision_recall_curves(questions, axes())
    assert [question.name for question in questions] == (names[1:] if classes == 2 else names)
    # Trapezoids under the points that are drawn; sums of some dozen doubles.
    drawn = [curve.line_.get_xydata().T for curve in rocs]
    assert np.mean([np.trapezoid(y, x) for x, y in drawn]) == pytest.approx(values["auroc"])
    assert np.mean([curve.roc_auc for curve in rocs]) == pytest.approx(values["auroc"])
    # Average precision is the area of steps, from recall 1 down to 0.
    drawn = [curve.line_.get_xydata().T for curve in precisions]
    assert {curve.line_.get_drawstyle() for curve in precisions} == {"steps-post"}
    assert np.mean([-(np.diff(x) * y[:-1]).sum() for x, y in drawn]) == pytest.approx(values["auprc"])
    assert np.mean([curve.average_precision for curve in precisions]) == pytest.approx(values["auprc"])


def test_curves_of_labels_leave_out_what_is_missing() -> None:
    targets = np.array([[1, 0, np.nan], [0, 0, np.nan], [np.nan, 0, np.nan], [1, 0, 1]], dtype=float)
    outputs = np.array([[0.9, 0.5, 0.5], [0.1, 0.5, 0.5], [0.0, 0.5, 0.5], [0.8, 0.5, 0.5]])
    questions = supervision_of("multi_label").questions(targets, outputs, ["a", "b", "c"])
    assert [name for name, *_ in questions] == ["a"]
    assert questions[0][2].tolist() == [0.9, 0.1, 0.8]
    assert roc_curves(questions, axes())[0].roc_auc == 1.0


def test_calibration_adds_up_to_the_error() -> None:
    labels, outputs = predicted(67, 3)
    bins = calibration(labels[:, 0].astype(int), outputs)
    assert bins.slides.sum() == 67 and np.isnan(bins.accuracy[bins.slides == 0]).all()
    gaps = np.nan_to_num(np.abs(bins.accuracy - bins.confidence)) * bins.slides / 67
    assert gaps.sum() == pytest.approx(measure("classes", labels, outputs, ["a", "b", "c"])["ece"])
    edges = np.arange(16) / 15
    filled = bins.slides > 0
    assert (bins.confidence[filled] > edges[:-1][filled]).all() and (bins.confidence[filled] <= edges[1:][filled]).all()


def test_confusion_counts_true_by_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells have counts of the classes that the kind takes: the likeliest, or the median grade."""
    texts: list[str] = []
    text = Axes.text

    def write(self: Axes, x: float, y: float, s: str, **style: object) -> object:
        texts.append(s)
        return text(self, x, y, s, **style)

    monkeypatch.setattr(Axes, "text", write)
    outputs = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.4, 0.25, 0.35], [0.1, 0.9, 0]])
    targets = np.array([[0], [0], [2], [1]], dtype=float)
    draw("classes", targets, outputs, ["a", "b", "c"])
    assert texts == ["1\n50%", "1\n50%", "0\n0%", "0\n0%", "1\n100%", "0\n0%", "1\n100%", "0\n0%", "0\n0%"]
    texts.clear()
    draw("ordinal", targets, outputs, ["a", "b", "c"])
    assert texts[6:] == ["0\n0%", "1\n100%", "0\n0%"]


def test_kinds_name_figures_that_there_are() -> None:
    assert {name for kind in KINDS.values() for name in kind.figures} == set(FIGURES)


def test_kaplan_meier_of_the_textbook() -> None:
    """The 6-MP arm of Freireich et al. 1963, whose estimates are in most textbooks (remission of leukaemia, weeks)."""
    events = np.array([6, 6, 6, 7, 10, 13, 16, 22, 23])
    censored = np.array([6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35])
    curve = kaplan_meier(np.r_[events, censored].astype(float), np.r_[np.ones(9, bool), np.zeros(12, bool)])
    # To the four digits that are printed.
    assert curve.evaluate([5, 6, 7, 10, 13, 16, 22, 23]) == pytest.approx(
        [1, 0.8571, 0.8067, 0.7529, 0.6902, 0.6275, 0.5378, 0.4482], abs=5e-5
    )


def test_survival_counts_patients_once() -> None:
    """Three slides of each: the split is by their mean risk, and no step and no number at risk is threefold."""
    targets, outputs, names = cohort("survival", 21)
    once = draw("survival", targets, outputs, names)["kaplan_meier"]
    again = np.repeat(np.arange(21), 3)
    # Single slides lie on the other side of the median; the patients' means are as they were.
    noise = np.tile([5.0, -5.0, 0.0], 21)[:, None]
    cases = [f"{patient:02}" for patient in again]
    assert np.array_equal(draw("survival", targets[again], outputs[again] + noise, names, cases)["kaplan_meier"], once)
    assert not np.array_equal(draw("survival", targets[again], outputs[again] + noise, names)["kaplan_meier"], once)
    differing = targets[again]
    differing[0, 0] += 1
    assert draw("survival", differing, outputs[again], names, cases) == {}


def test_what_is_undefined_is_left_out() -> None:
    labels, outputs = predicted(7, 2)
    assert set(draw("classes", np.ones((7, 1)), outputs, ["a", "b"])) == {"reliability", "confusion"}
    assert draw("multi_label", np.full((7, 2), np.nan), outputs, ["a", "b"]) == {}
    assert draw("survival", np.c_[labels + 1, np.zeros(7)], outputs[:, :1], ["risk"]) == {}  # no events
    assert draw("survival", np.c_[labels + 1, np.ones(7)], np.ones((7, 1)), ["risk"]) == {}  # all risks equal
    for kind in PICTURES:
        targets, outputs, names = cohort(kind, 7)
        assert draw(kind, targets[:0], outputs[:0], names) == {}


def test_small_cohorts_are_drawn() -> None:
    assert set(draw("regression", np.ones((1, 1)), np.ones((1, 1)), ["value"])) == {"scatter"}
    assert set(draw("survival", np.array([[0, 1], [0, 0]]), np.array([[1.0], [2.0]]), ["risk"])) == {"kaplan_meier"}
    assert len(draw("classes", *predicted(31, 15), [f"class {c}" for c in range(15)])) == 4


def test_a_figure_says_whose_it_is() -> None:
    targets, outputs, names = cohort("classes", 53)
    plain, about = (draw("classes", targets, outputs, names, about=text) for text in ("", "split val: 53 slides"))
    for name, picture in plain.items():
        assert picture.shape == about[name].shape and not np.array_equal(picture, about[name]), name


def test_precision_is_beside_the_share_of_positive_slides() -> None:
    """Which is what a model that knows nothing has."""
    targets, outputs, names = cohort("classes", 53)
    questions = supervision_of("classes").questions(targets, outputs, names)
    for curve, question in zip(precision_recall_curves(questions, axes()), questions, strict=True):
        assert curve.prevalence_pos_label == question.truth.mean()
