"""The runs of a K study: its arms, each trained with each seed, and what came of them."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from slidescale.engine.commands.study import StudyConfig
from slidescale.engine.config import Config, MemoryConfig
from slidescale.engine.errors import UserError
from slidescale.engine.files import write_csv
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.supervision.make import supervision_of
from slidescale.engine.training.checkpoint import is_reported
from slidescale.engine.training.history import read_history
from slidescale.engine.training.run_folder import check_same_settings, find_run_folder, read_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """A point of the curve: a configuration that runs with every seed.

    Attributes:
        name: of the folders of its runs, to which the seed is added.
        trained: "end to end", or "frozen" for an aggregator on the features of an encoder that does not train.
    """

    name: str
    config: Config
    trained: Literal["end to end", "frozen"] = "end to end"


@dataclass(frozen=True)
class Outcome:
    """A run at its last epoch.

    Attributes:
        tiles: per training bag, the mean over slides.
        metric: of validation; None if it is undefined.
    """

    arm: str
    trained: str
    seed: int
    tiles: float
    train_loss: float
    val_loss: float | None
    metric: float | None
    seconds: float


def arms_of(study: StudyConfig) -> list[Arm]:
    """List the arms: one with a frozen encoder that sees all tiles, then one per K, smallest first and "all" last.

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
    """Run every arm with every seed under `folder`, one seed after another; what is finished there is not run again.

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
    """Write a CSV with one row per run."""
    names = list(Outcome.__dataclass_fields__)
    write_csv(path, names, ([getattr(outcome, name) for name in names] for outcome in outcomes))


def _look_for(config: Config) -> tuple[Path | None, bool]:
    """The folder of a run that was begun, and whether its last epoch has been validated and reported.

    Raises:
        UserError: it was begun with other settings, or for another number of epochs, which sets how rates fall.
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
    assert tiles is not None and train_loss is not None, "every epoch has these"
    return Outcome(
        arm.name,
        arm.trained,
        seed,
        tiles=tiles,
        train_loss=train_loss,
        val_loss=last["val_loss"],
        metric=last.get(f"val_{supervision_of(arm.config.data.supervision).headline}"),
        seconds=sum(row["seconds"] or 0.0 for row in rows),
    )
