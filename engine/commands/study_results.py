"""A K study from its runs to its results: a table, a picture, curves in TensorBoard, and a page."""

import logging
import os
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch.utils.tensorboard import SummaryWriter

from slidescale.engine.commands.study import StudyConfig
from slidescale.engine.commands.study_picture import Point, draw_against_k
from slidescale.engine.commands.study_runs import Outcome, arms_of, run_study
from slidescale.engine.files import replacing, save_png, write_text
from slidescale.engine.parallel.mesh import join
from slidescale.engine.process.stopping import keep_advice
from slidescale.engine.run import run
from slidescale.engine.supervision.make import headline_title, supervision_of
from slidescale.engine.training.run_folder import read_record

log = logging.getLogger(__name__)


def conduct(study: StudyConfig, argv: Sequence[str], about: str) -> None:
    """Run a study and show its results; every rank that a launcher has started calls it.

    Args:
        argv: the command line, for the page.
        about: a paragraph for the page; may be empty.
    """
    keep_advice("what is finished is not run again: give the same command to go on")
    folder = study.config.run.out / study.config.run.name
    begin = time.perf_counter()
    world = join().world
    outcomes = run_study(arms_of(study), study.seeds, folder, run, world)
    if world.rank == 0:
        metric = supervision_of(study.config.data.supervision).headline
        show(outcomes, metric, folder)
        text = medians(outcomes, metric)
        log.info(
            "\n%s\n\nresults in %s: study.csv, k_study.png, and every run; %.0f minutes this time",
            text,
            folder,
            (time.perf_counter() - begin) / 60,
        )
        if study.page is not None:
            write_page(study.page, about, text, folder, argv, world.size)


def medians(outcomes: Sequence[Outcome], metric: str) -> str:
    """A Markdown table of medians, with the range over seeds."""
    shown = headline_title(metric)
    header = ["trained", "K", "tiles per bag", "train loss", f"validation {shown}", "seeds", "minutes per run"]
    rows = []
    for arm in dict.fromkeys(outcome.arm for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.arm == arm]
        rows.append(
            [
                mine[0].trained,
                "all" if mine[0].trained == "frozen" else arm.removeprefix("k-"),
                f"{statistics.median(outcome.tiles for outcome in mine):,.0f}",
                _median_and_range([outcome.train_loss for outcome in mine]),
                _median_and_range([outcome.metric for outcome in mine if outcome.metric is not None]),
                str(len(mine)),
                f"{statistics.median(outcome.seconds for outcome in mine) / 60:.1f}",
            ]
        )
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def write_page(page: Path, about: str, text: str, folder: Path, argv: Sequence[str], ranks: int) -> None:
    """A page with the study's command, what it is about, its table and the picture that `folder` has."""
    words = shlex.join(word for word in argv if not word.startswith("--local_rank"))  # which a launcher adds
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} cores"
    picture = folder / "k_study.png"
    shown = page.with_name(picture.name)
    with replacing(shown) as unfinished:
        unfinished.write_bytes(picture.read_bytes())
    # Those of the runs, which may be older than the code that puts them together.
    commits = {read_record(record.parent)["commit"] for record in folder.glob("*/config.json")} - {None}
    made = f"PyTorch {torch.__version__.split('+')[0]}"
    made += f"; commit {', '.join(sorted(commit[:12] + commit[40:] for commit in commits))}" if commits else ""
    parts = [
        "# More tiles per slide",
        "Written by this command, which trains on more and more of each slide, and beside that on a frozen encoder:",
        f"    {'python ' * (ranks == 1)}recipes/k_study.py {words}",
        f"{ranks} rank{'s' * (ranks > 1)} on {where}; {made}. Medians over seeds and, in brackets, their range, "
        "at the last epoch.",
        *([about] if about else []),
        f"![Training loss and validation against K]({shown.name})",
        text,
    ]
    write_text(page, "\n\n".join(parts) + "\n")


def show(outcomes: Sequence[Outcome], metric: str, folder: Path) -> np.ndarray:
    """Draw the study as `k_study.png` under `folder`, add it to TensorBoard there, and return the picture."""
    losses = [Point(each.arm, each.trained == "frozen", each.tiles, each.train_loss) for each in outcomes]
    scores = [
        Point(each.arm, each.trained == "frozen", each.tiles, each.metric)
        for each in outcomes
        if each.metric is not None
    ]
    picture = draw_against_k(losses, scores, headline_title(metric))
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


def _median_and_range(values: Sequence[float]) -> str:
    if not values:
        return "undefined"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
