"""A K study: the same training on more and more of each slide, over several seeds, beside a frozen encoder.

What Campanella et al. 2024 ("Beyond Multiple Instance Learning") report, asked of one's own slides: does the training
loss fall with the number of tiles K, does validation rise, and does training end to end beat an aggregator alone?
All runs have the same splits, epochs and settings. What is compared is the last epoch, so that no epoch is chosen by
the very slides that are then reported.
"""

import logging
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from tabulate import tabulate
from torch.utils.tensorboard import SummaryWriter

from slidescale.engine.commands.recipe import command, demo_defaults, is_study
from slidescale.engine.commands.study_picture import Point, draw_against_k
from slidescale.engine.config import Config, MemoryConfig
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.files import replacing, save_png, write_csv, write_text
from slidescale.engine.logger import configure_logging
from slidescale.engine.parallel.mesh import is_main_rank, join
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.process.stopping import keep_advice
from slidescale.engine.run import run
from slidescale.engine.supervision.make import headline_title, supervision_of
from slidescale.engine.training.checkpoint import is_reported
from slidescale.engine.training.history import read_history
from slidescale.engine.training.run_folder import check_same_settings, find_run_folder, read_record

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is varied; all else is the same for every run."""

    k: tuple[int | Literal["all"], ...] = (4, 16, 64, "all")
    """Tiles in a training bag, an arm of the study each; validation always uses all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm is run with each of these as --run.seed, on the same splits."""
    frozen_encoder: str | None = "same"
    """Encoder of the arm in which only the aggregator trains, on all tiles. same: the other arms' own, as they start
    from it; a name as in --model.encoder: that one; None: no such arm."""
    frozen_weights: Path | None = None
    """State dict of a frozen encoder that is named; None: the weights that are published for it."""
    page: Path | None = None
    """Markdown page to write, with the picture beside it."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    """Of every run; --run.name is the study's, whose runs lie in a folder of that name."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if not self.k or any(k != "all" and k < 1 for k in self.k):
            raise ConfigError(f"--k is {self.k}: must be 'all' or at least 1 tile, once or more")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds is {self.seeds}: must be one seed or more, none negative, none twice")
        if self.frozen_encoder in ("same", None) and self.frozen_weights is not None:
            raise ConfigError(f"--frozen-weights is {self.frozen_weights}: must go with a named --frozen-encoder")
        model = self.config.model
        if self.frozen_encoder == "same" and not (model.pretrained or model.weights):
            raise ConfigError(
                f"--frozen-encoder is 'same', and {model.encoder} has random weights, of which nothing can be expected "
                "frozen: add --model.pretrained or --model.weights, or name an encoder, or give None"
            )


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


def main(
    description: str,
    *,
    default: StudyConfig,
    demo: StudyConfig,
    about_demo: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a study from the command line.

    Args:
        description: shown by --help.
        default: the study's settings when a manifest is given.
        demo: its settings without one, for the demo cohort.
        about_demo: a paragraph for the page of a study of the demo cohort.
        argv: the command line; None takes the process's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    configure_logging(is_main_rank())
    with command():
        base = default if is_study(argv) else demo
        description += demo_defaults(_flat(base), _flat(demo))
        study = tyro.cli(StudyConfig, default=base, args=argv, description=description)
        keep_advice("what is finished is not run again: give the same command to go on")
        folder = study.config.run.out / study.config.run.name
        begin = time.perf_counter()
        world = join().world
        outcomes = run_study(arms_of(study), study.seeds, folder, run, world)
        if world.rank == 0:
            metric = supervision_of(study.config.data.supervision).headline
            show(outcomes, metric, folder)
            text = tell(outcomes, metric)
            log.info(
                "\n%s\n\nresults in %s: study.csv, k_study.png, and every run; %.0f minutes this time",
                text,
                folder,
                (time.perf_counter() - begin) / 60,
            )
            if study.page is not None:
                about = about_demo if study.config.data.manifest is None else ""
                write_page(study.page, about, text, folder, argv, world.size)


def _flat(study: StudyConfig) -> dict[str, Any]:
    """All settings by dotted name."""
    own = {each.name: getattr(study, each.name) for each in fields(study) if each.name != "config"}
    return own | study.config.flat()


def arms_of(study: StudyConfig) -> list[Arm]:
    """One arm with a frozen encoder that sees all tiles, then one for each K, smallest first and "all" last.

    The frozen one is first because it is short, and the one that may lack weights.
    """
    config = study.config
    in_order = sorted(set(study.k), key=lambda k: float("inf") if k == "all" else k)
    arms = [Arm(f"k-{k}", replace(config, data=replace(config.data, k=k))) for k in in_order]
    if study.frozen_encoder is None:
        return arms
    model = config.model
    if study.frozen_encoder != "same":
        weights = study.frozen_weights
        model = replace(model, encoder=study.frozen_encoder, pretrained=weights is None, weights=weights)
    frozen = replace(
        config,
        model=replace(model, frozen=True, drop_path=0.0, lora_rank=0),
        data=replace(config.data, k="all", augment_symmetry=False, stain_jitter=0.0),
        memory=MemoryConfig(budget=config.memory.budget, chunk=config.memory.chunk),
        optim=replace(config.optim, layer_decay=1.0, encoder_lr_scale=1.0, encoder_frozen_epochs=0.0),
    )
    return [Arm("frozen", frozen, trained="frozen"), *arms]


def run_study(
    arms: Iterable[Arm],
    seeds: Sequence[int],
    folder: Path,
    run: Callable[[Config], Path],
    world: RankGroup | None = None,
) -> list[Outcome]:
    """Run every arm with every seed under `folder`, a seed after another; what is finished there is not run again.

    Args:
        run: trains as a config says, and returns the run's folder.
        world: all ranks, each of which calls this; None: this process alone.

    Raises:
        UserError: a run of other settings is in the way, or `run` does.
    """
    arms, world = list(arms), world or RankGroup()
    outcomes: list[Outcome] = []
    for seed in seeds:
        for arm in arms:
            name = f"{arm.name}-seed-{seed}"
            config = replace(arm.config, run=replace(arm.config.run, name=name, out=folder, seed=seed))
            begun, finished = world.ask_main(partial(_look_for, config))
            if not finished:
                log.info("study: %s (run %d of %d)", name, len(outcomes) + 1, len(arms) * len(seeds))
                begun = run(replace(config, resume=begun is not None))
            assert begun is not None
            outcomes.append(world.ask_main(partial(_outcome, arm, seed, begun)))
            if world.rank == 0:
                write_outcomes(folder / "study.csv", outcomes)
    return outcomes


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A row a run."""
    names = list(Outcome.__dataclass_fields__)
    write_csv(path, names, ([getattr(outcome, name) for name in names] for outcome in outcomes))


def tell(outcomes: Sequence[Outcome], metric: str) -> str:
    """A Markdown table of medians, with the range over seeds."""
    shown = headline_title(metric)
    header = ["trained", "K", "tiles a bag", "train loss", f"validation {shown}", "seeds", "minutes a run"]
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
    # Of the runs, which may be older than the code that puts them together.
    commits = {read_record(record.parent)["commit"] for record in folder.glob("*/config.json")} - {None}
    made = f"PyTorch {torch.__version__.split('+')[0]}"
    made += f"; commit {', '.join(sorted(commit[:12] + commit[40:] for commit in commits))}" if commits else ""
    parts = [
        "# More tiles a slide",
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
    """Draw the study as `k_study.png` under `folder`, and tell it to TensorBoard there; the picture."""
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


def _look_for(config: Config) -> tuple[Path | None, bool]:
    """The folder of a run that was begun, and whether its last epoch has been validated and told of.

    Raises:
        UserError: it was begun with other settings, or for another number of epochs, by which rates fall.
    """
    try:
        folder = find_run_folder(config.run.out, config.run.name)
    except UserError:
        return None, False
    another = "to study these settings, give another --run.name"
    try:
        check_same_settings(folder, config)
    except UserError as error:
        raise UserError(f"{error}\n{another}") from None
    if (epochs := read_record(folder)["config"]["run"]["epochs"]) != config.run.epochs:
        raise UserError(f"{folder} was begun with --run.epochs {epochs}, and that is {config.run.epochs}: {another}")
    rows = read_history(folder)
    return folder, bool(rows) and rows[-1]["epoch"] == epochs and is_reported(folder / "checkpoints")


def _outcome(arm: Arm, seed: int, folder: Path) -> Outcome:
    rows = read_history(folder)
    last = rows[-1]
    assert last["epoch"] == arm.config.run.epochs, f"{folder} has come to its end"
    tiles, train_loss = last["tiles_a_slide"], last["train_loss"]
    headline = supervision_of(arm.config.data.supervision).headline
    assert tiles is not None and train_loss is not None, "every epoch has these"
    return Outcome(
        arm.name,
        arm.trained,
        seed,
        tiles=tiles,
        train_loss=train_loss,
        val_loss=last["val_loss"],
        metric=last.get(f"val_{headline}"),
        seconds=sum(row["seconds"] or 0.0 for row in rows),
    )


def _median_and_range(values: Sequence[float]) -> str:
    if not values:
        return "undefined"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
