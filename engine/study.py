"""A K study: the same training on more and more of each slide, over several seeds, beside a frozen encoder.

What Campanella et al. 2024 ("Beyond Multiple Instance Learning") report, asked of one's own slides: does the training
loss fall with the number of tiles K, does validation rise, and does training end to end beat an aggregator alone?
All runs have the same splits, epochs and settings. What is compared is the last epoch, so that no epoch is chosen by
the very slides that are then reported.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from slidescale.engine.config import Config
from slidescale.engine.data.cohort import write_csv
from slidescale.engine.errors import UserError
from slidescale.engine.history import read_history
from slidescale.engine.metrics import HEADLINES
from slidescale.engine.report import save_png
from slidescale.engine.run_folder import check_same_settings, find_run_folder
from slidescale.engine.study_picture import Point, draw_against_k

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """What one curve's point is made of: a configuration that every seed runs.

    Attributes:
        name: of its runs' folders, to which the seed is added.
        trained: "end to end", or "frozen" for an aggregator on the features of an encoder that does not train.
    """

    name: str
    config: Config
    trained: Literal["end to end", "frozen"] = "end to end"


@dataclass(frozen=True)
class Outcome:
    """One run at its last epoch.

    Attributes:
        tiles: of a training bag, the mean over slides.
        metric: of validation; None where it is not defined.
    """

    arm: str
    trained: str
    seed: int
    tiles: float
    train_loss: float
    val_loss: float | None
    metric: float | None
    seconds: float


def arms_of(config: Config, ks: Sequence[int | Literal["all"]], frozen: Config | None) -> list[Arm]:
    """An arm for each K, smallest first and "all" last, and one with a frozen encoder that sees all tiles."""
    in_order = sorted(set(ks), key=lambda k: float("inf") if k == "all" else k)
    arms = [Arm(f"k-{k}", replace(config, data=replace(config.data, k=k))) for k in in_order]
    if frozen is not None:
        arms.append(Arm("frozen", replace(frozen, data=replace(frozen.data, k="all")), trained="frozen"))
    return arms


def run_study(arms: Iterable[Arm], seeds: Sequence[int], folder: Path, run: Callable[[Config], Path]) -> list[Outcome]:
    """Run every arm with every seed under `folder`, a seed after another; what is finished there is not run again.

    Args:
        run: trains as a config says, and returns the run's folder.
    """
    arms = list(arms)
    outcomes: list[Outcome] = []
    for seed in seeds:
        for arm in arms:
            name = f"{arm.name}-seed-{seed}"
            config = replace(arm.config, run=replace(arm.config.run, name=name, out=folder, seed=seed))
            done = _find(folder, name)
            if done is not None:
                check_same_settings(done, config)
            if done is None or len(read_history(done)) < config.run.epochs:
                log.info("study: %s (run %d of %d)", name, len(outcomes) + 1, len(arms) * len(seeds))
                done = run(replace(config, resume=done is not None))
            outcomes.append(_outcome(arm, seed, done))
            write_outcomes(folder / "study.csv", outcomes)
    return outcomes


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A row a run."""
    names = list(Outcome.__dataclass_fields__)
    write_csv(path, names, ([getattr(outcome, name) for name in names] for outcome in outcomes))


def tell(outcomes: Sequence[Outcome], metric: str) -> tuple[list[str], list[list[str]]]:
    """A table of medians, with the range over seeds: header and rows."""
    header = ["trained", "K", "tiles a bag", "train loss", f"validation {metric}", "seeds", "minutes a run"]
    rows = []
    for arm in dict.fromkeys(outcome.arm for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.arm == arm]
        rows.append([
            mine[0].trained, "all" if mine[0].trained == "frozen" else arm.removeprefix("k-"),
            f"{statistics.median(outcome.tiles for outcome in mine):,.0f}",
            _median_and_range([outcome.train_loss for outcome in mine]),
            _median_and_range([outcome.metric for outcome in mine if outcome.metric is not None]),
            str(len(mine)), f"{statistics.median(outcome.seconds for outcome in mine) / 60:.1f}",
        ])  # fmt: skip
    return header, rows


def show(outcomes: Sequence[Outcome], metric: str, folder: Path) -> np.ndarray:
    """Draw the study as `k_study.png` under `folder`, and tell it to TensorBoard there; the picture."""
    losses = [Point(each.trained == "frozen", each.tiles, each.train_loss) for each in outcomes]
    scores = [Point(each.trained == "frozen", each.tiles, each.metric) for each in outcomes if each.metric is not None]
    picture = draw_against_k(losses, scores, metric)
    save_png(picture, folder / "k_study.png")
    with SummaryWriter(str(folder / "study")) as board:
        board.add_image("k_study", picture, 0, dataformats="HWC")
        for arm in dict.fromkeys(outcome.arm for outcome in outcomes):
            mine = [outcome for outcome in outcomes if outcome.arm == arm]
            at = round(statistics.median(outcome.tiles for outcome in mine))
            kind = mine[0].trained.replace(" ", "_")
            board.add_scalar(f"k_study/train_loss/{kind}", statistics.median(each.train_loss for each in mine), at)
            if defined := [each.metric for each in mine if each.metric is not None]:
                board.add_scalar(f"k_study/val_{metric}/{kind}", statistics.median(defined), at)
    return picture


def _find(folder: Path, name: str) -> Path | None:
    try:
        return find_run_folder(folder, name)
    except UserError:
        return None


def _outcome(arm: Arm, seed: int, folder: Path) -> Outcome:
    rows = read_history(folder)
    last = rows[-1]
    tiles, train_loss = last["tiles_a_slide"], last["train_loss"]
    assert tiles is not None and train_loss is not None, "every epoch has these"
    return Outcome(
        arm.name, arm.trained, seed, tiles=tiles, train_loss=train_loss, val_loss=last["val_loss"],
        metric=last.get(f"val_{HEADLINES[arm.config.data.supervision]}"),
        seconds=sum(row["seconds"] or 0.0 for row in rows),
    )  # fmt: skip


def _median_and_range(values: Sequence[float]) -> str:
    if not values:
        return "undefined"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
