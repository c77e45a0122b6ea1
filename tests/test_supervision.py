"""What slides can be labelled with: objectives against their formulas, and manifests and runs of each kind."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slidescale.engine.config import Config, DataConfig, OptimConfig, RunConfig
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.supervision.make import fit_objective, make_objective
from slidescale.engine.supervision.multi_label import BinaryCrossEntropy
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.ordinal import CumulativeLogits
from slidescale.engine.supervision.regression import SquaredError
from slidescale.engine.supervision.survival import HazardLikelihood, survival_edges

NAN = math.nan
LOGITS = [0.3, -1.2, 2.1, 0.7, -0.4]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def cross_entropy(z: list[float], target: tuple[float, ...]) -> float:
    weights = [1.0, 2.0, 0.5, 1.0, 3.0]
    return -weights[int(target[0])] * math.log(math.exp(z[int(target[0])]) / sum(map(math.exp, z)))


GRADE_WEIGHTS = [1.0, 2.0, 0.5, 1.0, 3.0, 4.0]


def grade_probabilities(z: list[float]) -> list[float]:
    """Differences of the cumulative ones, whose logits fall by softplus of each further logit."""
    logits = [z[0] - sum(math.log1p(math.exp(each)) for each in z[1 : k + 1]) for k in range(len(z))]
    above = [1.0, *map(sigmoid, logits), 0.0]
    return [before - after for before, after in pairwise(above)]


def ordinal(z: list[float], target: tuple[float, ...]) -> float:
    return -GRADE_WEIGHTS[int(target[0])] * math.log(grade_probabilities(z)[int(target[0])])


def multi_label(z: list[float], target: tuple[float, ...]) -> float:
    weights = [1.0, 2.0, 0.5, 1.0, 4.0]
    known = [i for i, value in enumerate(target) if value in (0.0, 1.0)]
    losses = [-weights[i] * math.log(sigmoid(z[i])) if target[i] else -math.log(1 - sigmoid(z[i])) for i in known]
    return sum(losses) / len(losses)


def regression(z: list[float], target: tuple[float, ...]) -> float:
    return (z[0] - (target[0] - 40.0) / 8.0) ** 2


EDGES = [2.0, 5.0, 5.5, 11.0]


def survival(z: list[float], target: tuple[float, ...]) -> float:
    """The likelihood, as a product of hazards."""
    hazards = [sigmoid(value) for value in z]
    time, event = target
    last = sum(edge <= time for edge in EDGES)
    likelihood = hazards[last] if event else 1 - hazards[last]
    for hazard in hazards[:last]:
        likelihood *= 1 - hazard
    return -math.log(likelihood)


Formula = Callable[[list[float], tuple[float, ...]], float]
# Both sides of each edge, and each edge itself, which belongs to the bin above it.
TIMES = [0.1, 2.0, 3.0, math.nextafter(5.0, 0), 5.0, 5.2, 5.5, 11.0, 1e6]
FORMULAS: dict[str, tuple[Callable[[], Objective], Formula, list[tuple[float, ...]]]] = {
    "classes": (
        lambda: CrossEntropy([1.0, 2.0, 0.5, 1.0, 3.0], 5),
        cross_entropy,
        [(float(index),) for index in range(5)],
    ),
    "ordinal": (
        lambda: CumulativeLogits(GRADE_WEIGHTS, 6),
        ordinal,
        [(float(index),) for index in range(6)],
    ),
    "multi_label": (
        lambda: BinaryCrossEntropy([1.0, 2.0, 0.5, 1.0, 4.0], 5),
        multi_label,
        [(1.0, 0.0, 1.0, 1.0, 0.0), (NAN, 0.0, NAN, 1.0, 1.0), (NAN, NAN, NAN, NAN, 1.0), (0.0, NAN, 0.0, 0.0, NAN)],
    ),
    "regression": (lambda: SquaredError(40.0, 8.0), regression, [(40.0,), (-3.5,), (77.0,)]),
    "survival": (
        lambda: HazardLikelihood(EDGES),
        survival,
        [(time, event) for time in TIMES for event in (0.0, 1.0)],
    ),
}


def as_target(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def differences(kind: str) -> list[float]:
    """Between an objective's losses in doubles and the formula's."""
    make, formula, targets = FORMULAS[kind]
    objective = make()
    z = LOGITS[: objective.outputs]
    logits = torch.tensor(z, dtype=torch.float64)
    return [abs(objective(logits, as_target(target)).item() - formula(z, target)) for target in targets]


@pytest.mark.parametrize("kind", FORMULAS)
def test_losses_are_their_formulas(kind: str) -> None:
    """In doubles, where only rounding can differ; gradients against finite differences."""
    assert max(differences(kind)) < 1e-12
    make, _, targets = FORMULAS[kind]
    objective = make()
    logits = torch.tensor(LOGITS[: objective.outputs], dtype=torch.float64, requires_grad=True)
    for values in targets:
        loss = objective(logits, as_target(values))
        assert loss.shape == ()
        assert loss.item() != 0 or kind == "regression"
        assert torch.autograd.gradcheck(objective, (logits, as_target(values)))


@pytest.mark.parametrize("bug", ["edges belong to the bin below", "censored is observed", "missing is negative"])
def test_planted_bugs_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    searchsorted, forward = torch.searchsorted, HazardLikelihood.forward
    match bug:
        case "edges belong to the bin below":
            monkeypatch.setattr(torch, "searchsorted", lambda edges, time, right: searchsorted(edges, time))
        case "censored is observed":
            monkeypatch.setattr(
                HazardLikelihood, "forward", lambda self, logits, target: forward(self, logits, target.clamp(min=1))
            )
        case "missing is negative":
            monkeypatch.setattr(Tensor, "isnan", lambda self: torch.zeros_like(self, dtype=torch.bool))
    kind = "multi_label" if bug.startswith("missing") else "survival"
    assert max(differences(kind)) > 1e-3


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("steepness", [300.0, -300.0])
def test_large_logits_stay_finite(kind: str, steepness: float) -> None:
    """In fp32, where exp(300) is infinite and sigmoid(300) is 1."""
    make, _, targets = FORMULAS[kind]
    objective = make()
    for values in targets:
        logits = (steepness * torch.tensor(LOGITS[: objective.outputs])).requires_grad_()
        loss = objective(logits, as_target(values))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert objective.predict(logits).isfinite().all()


def test_missing_labels_do_not_count() -> None:
    objective = BinaryCrossEntropy((), 3)
    logits = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(logits, as_target((1.0, NAN, 0.0))), logits)
    assert gradient[1] == 0
    assert (gradient[[0, 2]] != 0).all()
    nothing = objective(logits, as_target((NAN, NAN, NAN)))
    assert nothing.item() == 0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert torch.equal(gradient, torch.zeros(3)), "and there is a graph, so that every rank makes this backward"


def test_what_logits_mean() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    assert CrossEntropy((), 5).predict(logits).sum().item() == pytest.approx(1)
    expected = torch.tensor([sigmoid(z) for z in LOGITS], dtype=torch.float64)
    torch.testing.assert_close(BinaryCrossEntropy((), 5).predict(logits), expected)
    assert SquaredError(40.0, 8.0).predict(logits[:1]).tolist() == [pytest.approx(42.4)]
    alive = np.cumprod([1 - sigmoid(z) for z in LOGITS])
    risk = HazardLikelihood(EDGES).predict(logits)
    assert risk.tolist() == [pytest.approx(-alive.sum())]
    sooner = logits + torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
    assert HazardLikelihood(EDGES).predict(sooner).item() > risk.item(), "an earlier event is a larger risk"


@pytest.mark.parametrize("grades", [2, 3, 6])
def test_probabilities_of_grades_are_consistent(grades: int) -> None:
    """Whatever the logits, P(y > k) does not rise with k, and the grades' probabilities sum to 1."""
    objective = CumulativeLogits((), grades)
    assert objective.outputs == grades - 1
    for logits in 8 * torch.randn(200, grades - 1, generator=torch.Generator().manual_seed(0)):
        probabilities = objective.predict(logits)
        assert (probabilities >= 0).all()
        assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    z = LOGITS[: grades - 1]
    found = objective.predict(torch.tensor(z, dtype=torch.float64))
    assert found.tolist() == pytest.approx(grade_probabilities(z))


def test_a_number_far_from_zero_keeps_its_digits() -> None:
    """In fp32, 1e8 + 1 and 1e8 + 3 are both 1e8 or the next number; the standardised ones are far apart."""
    objective = SquaredError(1e8, 2.0)
    logits = torch.tensor([0.5])
    assert objective(logits, as_target((1e8 + 1,))).item() == 0
    assert objective(logits, as_target((1e8 + 3,))).item() == 1
    assert objective.predict(logits).tolist() == [1e8 + 1]


@pytest.mark.parametrize("kind", FORMULAS)
def test_an_objective_is_made_again_of_its_record(kind: str) -> None:
    make, _, targets = FORMULAS[kind]
    objective = make()
    again = make_objective(json.loads(json.dumps(objective.record())))
    assert type(again) is type(objective)
    assert again.outputs == objective.outputs
    logits = torch.tensor(LOGITS[: objective.outputs])
    assert torch.equal(again.predict(logits), objective.predict(logits))
    for values in targets:
        assert torch.equal(again(logits, as_target(values)), objective(logits, as_target(values)))


def fitted(
    names: list[str], targets: list[tuple[float, ...]], weights: tuple[float, ...] = (), **data: Any
) -> Objective:
    config = Config(run=RunConfig(name="t"), data=DataConfig(**data), optim=OptimConfig(class_weights=weights))
    return fit_objective(names, targets, config)


def test_scale_and_bins_come_from_the_train_split() -> None:
    found = fitted(["age"], [(1.0,), (4.0,), (7.0,)], supervision="regression")
    assert isinstance(found, SquaredError)
    assert (found.mean, found.sd) == (4.0, pytest.approx(math.sqrt(6)))
    train = [(float(time), float(time % 3 > 0)) for time in range(1, 32)]
    found = fitted(["risk"], train, supervision="survival", survival_bins=3)
    assert isinstance(found, HazardLikelihood)
    events = [time for time, event in train if event]
    counts = np.histogram(events, [0, *found.edges.tolist(), 99])[0]
    assert counts.tolist() == [7, 7, 7], "of the observed events alone"


def test_weights_do_not_change_the_size_of_the_loss() -> None:
    """Their mean over the train split's slides is 1, of each label where it is known."""
    train = [(0.0,)] * 7 + [(1.0,)] * 2 + [(2.0,)]
    found = fitted(["a", "b", "c"], train, (1.0, 2.0, 8.0))
    weights = found.settings()["class_weights"]
    assert weights == pytest.approx([1 / 1.9, 2 / 1.9, 8 / 1.9])
    assert sum(weights[int(index)] for (index,) in train) == pytest.approx(len(train))
    labels = [(1.0, NAN), (0.0, 1.0), (0.0, 1.0), (NAN, 0.0), (0.0, NAN)]
    found = fitted(["ER", "PR"], labels, (5.0, 0.5), supervision="multi_label", label_columns=("ER", "PR"))
    plain = fitted(["ER", "PR"], labels, supervision="multi_label", label_columns=("ER", "PR"))
    assert plain.settings()["scales"] == [1.0, 1.0]
    # Logits of 0 cost log 2 with each label, whatever it is.
    even = torch.zeros(2, dtype=torch.float64)
    first = sum(found(even, as_target((label, NAN))).item() for label, _ in labels if not math.isnan(label))
    second = sum(found(even, as_target((NAN, label))).item() for _, label in labels if not math.isnan(label))
    assert (first, second) == pytest.approx((4 * math.log(2), 3 * math.log(2)))


def test_censored_patients_may_count_less() -> None:
    """MCAT's formula: (1 − α) of the loss of all, and α of that of the observed."""
    alpha, targets = 0.4, [(3.0, 1.0), (3.0, 0.0), (11.0, 0.0), (5.0, 1.0)]
    z = LOGITS[: len(EDGES) + 1]
    everyone = sum(survival(z, target) for target in targets)
    observed = sum(survival(z, target) for target in targets if target[1])
    objective = HazardLikelihood(EDGES, censored_alpha=alpha)
    logits = torch.tensor(z, dtype=torch.float64)
    found = sum(objective(logits, as_target(target)).item() for target in targets)
    assert found == pytest.approx((1 - alpha) * everyone + alpha * observed, abs=1e-12)
    assert make_objective(objective.record()).settings() == objective.settings()
    old = {name: value for name, value in objective.record().items() if name != "censored_alpha"}
    assert make_objective(old).settings()["censored_alpha"] == 0.0


@pytest.mark.parametrize("times", [[1.0, 2.0], [3.0, 3.0, 3.0, 3.0, 9.0], []])
def test_bins_that_cannot_be_filled(times: list[float]) -> None:
    targets = [(time, 1.0) for time in times] + [(4.0, 0.0)] * 9
    with pytest.raises(ValueError, match=rf"{len(times)} observed events .* do not fill 3 bins"):
        survival_edges(targets, 3)
