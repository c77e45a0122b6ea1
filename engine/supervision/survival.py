"""Survival: each slide has a time until an event, or until its patient was last seen without it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from slidescale.engine.config import Config, DataConfig
from slidescale.engine.supervision.base import Supervision, Target, Targets
from slidescale.engine.supervision.cells import BINARY, Problem, Record, finite_number, is_missing
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.supervision.rates import Metric, ratio


class HazardLikelihood(Objective):
    """Negative log-likelihood of a time until an event, in bins of time. The target is (time, event) `[2]`.

    Logit j is that of the hazard h_j: the probability that the event comes in bin j when it has not come before. With
    the slide's time in bin b, an observed event (1) has likelihood h_b Π_{j<b} (1 − h_j), and a patient who was last
    seen without it (0, censored) Π_{j≤b} (1 − h_j), as if seen to the end of that bin (Zadeh & Schmid 2020,
    doi:10.1109/TPAMI.2020.2979450; for slides: Chen et al. 2021, MCAT). Cox's partial likelihood would need the slides
    still at risk at each event, and a step has one slide.

    Args:
        edges: `[bins − 1]`, increasing, in the manifest's unit of time; bin j holds edges[j−1] ≤ time < edges[j].
        censored_alpha: MCAT's α, 0 to 1: a censored patient's loss counts 1 − α times as much as an observed one's.
            There the loss is (1 − α) times that of all patients, plus α times that of the observed ones.
    """

    supervision = "survival"

    def __init__(self, edges: Sequence[float], censored_alpha: float = 0.0) -> None:
        super().__init__()
        self.outputs = len(edges) + 1
        self.censored_alpha = censored_alpha
        self.edges: Tensor
        self.register_buffer("edges", torch.tensor(edges, dtype=torch.float64))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of logits `[bins]`."""
        time, event = target.unbind()
        last = torch.searchsorted(self.edges, time, right=True)
        bins = torch.arange(self.outputs, device=logits.device)
        # log h = logsigmoid(z) and log(1 − h) = logsigmoid(−z): each bin up to the last has a yes or a no.
        happens = (bins == last) & (event == 1)
        logs = torch.where(happens, logsigmoid(logits), logsigmoid(-logits))
        share = (1 - self.censored_alpha * (1 - event)).to(logits.dtype)
        return -share * (logs * (bins <= last)).sum()

    def predict(self, logits: Tensor) -> Tensor:
        """Risk `[1]`, larger for an earlier event: minus the sum over bins of the probability to outlast them."""
        return -logsigmoid(-logits).cumsum(dim=-1).exp().sum(dim=-1, keepdim=True)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {"edges": self.edges.tolist(), "censored_alpha": self.censored_alpha}


class Survival(Supervision):
    """A time until an event.

    The target is (time, event) `[2]`, with event 1 observed and 0 censored; the output is a risk `[1]`, larger for an
    earlier event.
    """

    name = "survival"
    objective = HazardLikelihood
    column_settings = ("label_column", "event_column")
    settings = ("data.survival_bins", "optim.censored_alpha")
    headline = "concordance"
    headline_title = "concordance"
    figures = ("kaplan_meier",)

    def read(self, records: list[Record], data: DataConfig) -> Targets:
        """The time, and 1 for an observed event or 0 for a censored one."""
        targets = Targets(("risk",))
        for number, record in records:
            time_cell, event_cell = record[data.label_column], record[data.event_column]
            time, event = finite_number(time_cell), BINARY.get(event_cell)
            if not is_missing(time_cell) and (time is None or time <= 0):
                advice = "leave the row out, or give half a unit" if time == 0 else "leave the row out"
                problem = f"{data.label_column} {time_cell!r} is not a time above 0; {advice}"
                targets.problems.append(Problem(number, problem, f"{data.label_column} is not a time above 0"))
            if not is_missing(event_cell) and event is None:
                problem = f"{data.event_column} {event_cell!r} is not 1 (observed) or 0 (censored)"
                targets.problems.append(Problem(number, problem, f"{data.event_column} is not 1 or 0"))
            if time is not None and time > 0 and event is not None:
                targets.values[number] = (time, event)
        if train := targets.of_train(records, data):
            try:
                survival_edges(train, data.survival_bins)
            except ValueError as error:
                targets.problems.append(Problem(0, f"train split: {error}; use fewer --data.survival-bins"))
        return targets

    def fit(self, names: Sequence[str], targets: Sequence[Target], config: Config) -> Objective:
        """The likelihood over bins of about equally many of the train split's events."""
        return HazardLikelihood(survival_edges(targets, config.data.survival_bins), config.optim.censored_alpha)

    def target_columns(self, names: Sequence[str]) -> list[str]:
        """Two columns, time and event."""
        return ["time", "event"]

    def target_cells(self, names: Sequence[str], target: Target) -> list[str]:
        """The time with all its digits; 1 or 0."""
        return [repr(target[0]), f"{target[1]:.0f}"]

    def target_words(self, names: Sequence[str], target: Target) -> str:
        """When the event was, or until when there was none."""
        return f"{'event at' if target[1] else 'no event until'} {target[0]:g}"

    def output_columns(self, names: Sequence[str]) -> list[str]:
        """One column, risk, larger for an earlier event."""
        return ["risk"]

    def output_cells(self, names: Sequence[str], output: np.ndarray) -> list[str]:
        """The risk, seven digits."""
        return [format(value, ".7g") for value in output.tolist()]

    def output_words(self, names: Sequence[str], output: np.ndarray) -> str:
        """The risk."""
        return f"risk {output[0]:.4g}"

    def widths(self, names: Sequence[str]) -> tuple[int, int]:
        """Time and event, and a risk."""
        return 2, 1

    def measure(
        self, targets: np.ndarray, outputs: np.ndarray, names: Sequence[str], weights: np.ndarray
    ) -> dict[str, Metric]:
        """Concordance (Harrell et al. 1982), and pairs, the comparable ones.

        Two slides compare where the earlier time is an event; at the same time, an event precedes a censoring, and two
        events do not compare. Equal risks count half.
        """
        times, events, risks = targets[:, 0], targets[:, 1] == 1, outputs[:, 0]
        time, risk = times[events, None], risks[events, None]
        # Row: the slide whose event comes first; column: the one known to outlive it. Halves are exact in float32, and
        # so are their sums up to 2**23 drawn slides.
        comparable = ((time < times) | ((time == times) & ~events)).astype(np.float32)
        credit = comparable * (np.float32(0.5) * (risk > risks) + np.float32(0.5) * (risk >= risks))
        first, drawn = weights[:, events], weights.astype(np.float32)
        pairs = (first * (drawn @ comparable.T)).sum(1)
        concordance = ratio((first * (drawn @ credit.T)).sum(1), pairs)
        return {"concordance": Metric(concordance, (events,)), "pairs": Metric(pairs, (events,), step="whole")}


def survival_edges(targets: Sequence[Target], bins: int) -> list[float]:
    """Times `[bins − 1]` that cut the observed events into bins of about equally many.

    Args:
        targets: (time, event) of each slide of the train split.

    Raises:
        ValueError: a bin would have no event, from which its hazard could be learnt.
    """
    times = np.array([time for time, event in targets if event])
    if len(times) >= bins:
        edges = np.quantile(times, np.arange(1, bins) / bins)
        if len(np.unique(np.searchsorted(edges, times, side="right"))) == bins:
            return edges.tolist()
    raise ValueError(f"{len(times)} observed events at {len(np.unique(times))} different times do not fill {bins} bins")
