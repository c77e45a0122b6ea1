"""From a recipe's command line to a trained model."""

import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from slidescale.engine.checkpoint import Checkpoints, Progress
from slidescale.engine.config import Config
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.manifest import Manifest, read_manifest
from slidescale.engine.data.prefetch import TileReader
from slidescale.engine.data.synthetic import write_demo_cohort
from slidescale.engine.data.tiling import TileSpec
from slidescale.engine.ds_config import Schedule, complete_ds_config, read_ds_config, uses_bf16
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.logger import RunLog, configure_logging
from slidescale.engine.memory.two_pass import seeded
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.objective import CrossEntropy
from slidescale.engine.optim import make_optimizer, make_scheduler, parameter_groups
from slidescale.engine.parallel.mesh import is_main_rank, pick_device, start_world, stop_world
from slidescale.engine.parallel.strategy import SingleStrategy, Strategy
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.run_folder import choose_run_folder, record_run
from slidescale.engine.trainer import Trainer

log = logging.getLogger(__name__)

# The launcher ends all ranks within a second of the first one's end; the main rank must have spoken by then.
GRACE_S = 3.0


def main(description: str, *, default: Config, demo: Config, argv: Sequence[str] | None = None) -> None:
    """Run a recipe from the command line.

    Args:
        description: shown by --help.
        default: the recipe's settings when a manifest is given.
        demo: its settings without one, for the demo cohort.
        argv: the command line; None takes the process's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    configure_logging(is_main_rank())
    try:
        has_manifest = any(word.split("=")[0] == "--data.manifest" for word in argv)
        config = tyro.cli(Config, default=default if has_manifest else demo, args=argv, description=description)
        run(config)
    except UserError as error:
        # What is wrong with the input is found by all ranks alike, so one of them tells.
        if is_main_rank():
            sys.exit(f"error: {error}")
        time.sleep(GRACE_S)
        sys.exit(1)
    finally:
        stop_world()


def run(config: Config) -> Path:
    """Train as a config says.

    Returns:
        The run's folder.

    Raises:
        UserError: something about the input or the settings; no work is lost.
    """
    ds_content = _read_ds_config(config)
    manifest = read_manifest(config.data.manifest, config.data) if config.data.manifest else None
    device = pick_device(max(0, int(os.environ.get("LOCAL_RANK", config.local_rank))))
    group = start_world(device) if ds_content is not None else TileGroup()
    manifest = manifest or _demo_manifest(config, group)
    weights, classes = config.optim.class_weights, manifest.classes
    if weights and len(weights) != len(classes):
        raise ConfigError(f"optim.class_weights has {len(weights)} values for {len(classes)} classes: {classes}")
    folder = _open_run_folder(config, group)
    log.info(
        "run %s on %d × %s; watch it with: tensorboard --logdir %s", folder, group.size, device.type, config.run.out
    )

    cohort = Cohort(
        manifest, group, max_excluded=config.data.max_excluded, excluded_csv=folder / "excluded.csv"
    )  # fmt: skip
    data = config.data
    spec = TileSpec(
        tile_px=data.tile_px, mpp_um=data.mpp_um, min_tissue=data.min_tissue, default_mpp_um=data.default_mpp_um
    )
    cohort.tile(spec, config.run.out / "tilings", threads=data.readers)
    _describe(cohort)

    steps = len(cohort.usable("train"))
    schedule = Schedule(round(config.optim.warmup_epochs * steps), config.run.epochs * steps)
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and _has_bf16(device))
    ds_config = complete_ds_config(ds_content, config, schedule, bf16=bf16) if ds_content is not None else None
    bf16 = uses_bf16(ds_config) if ds_config is not None else bf16
    model = make_model(config, classes=len(manifest.classes), bf16=bf16).to(device)
    strategy = _make_strategy(model, config, schedule, ds_config, device)
    log.info(
        "%s (%.1f M parameters) + %s, %s, %s", config.model.encoder, _count_parameters(model) / 1e6,
        config.model.pooling, "bf16 autocast" if bf16 else "fp32", strategy.name,
    )  # fmt: skip
    if group.rank == 0 and not config.resume:
        record_run(folder, config, ds_config, manifest.classes)

    checkpoints = Checkpoints(folder / "checkpoints", group, strategy.name)
    progress = Progress(excluded={})
    if config.resume:
        progress = _resume(checkpoints, strategy, cohort)
    reader = TileReader(spec, threads=data.readers, pin=device.type == "cuda")
    run_log = RunLog(folder, main=group.rank == 0, steps=schedule.total_steps, done=progress.step)
    objective = CrossEntropy(config.optim.class_weights, len(manifest.classes)).to(device)
    try:
        Trainer(config, cohort, strategy, objective, reader, checkpoints, run_log, group, folder).fit(progress)
    finally:
        reader.close()
        run_log.close()
    log.info("results in %s: predictions.csv, heatmaps/, checkpoints/best", folder)
    return folder


def make_model(config: Config, *, classes: int, bf16: bool) -> SlideModel:
    """Encoder and aggregator, initialised from the run's seed."""
    settings = config.model
    with seeded(torch.device("cpu"), config.run.seed, "model"):
        encoder = Encoder(
            settings.encoder,
            tile_px=config.data.tile_px,
            pretrained=settings.pretrained,
            weights=settings.weights,
        )
        if encoder.has_batch_norm() and not (settings.pretrained or settings.weights or settings.slide_norm):
            log.warning(
                "%s has BatchNorm layers, whose statistics never train here, and random weights: it will hardly learn. "
                "Use pretrained weights, an encoder with other normalisation (resnet50_gn), or --model.slide-norm",
                settings.encoder,
            )
        aggregator = Aggregator(
            encoder.dim,
            classes,
            pooling=settings.pooling,
            hidden_dim=settings.hidden_dim,
            attention_dim=settings.attention_dim,
            dropout=settings.dropout,
            slide_norm=settings.slide_norm,
        )
    return SlideModel(encoder, aggregator, autocast=torch.bfloat16 if bf16 else None)


def _make_strategy(
    model: SlideModel, config: Config, schedule: Schedule, ds_config: dict[str, Any] | None, device: torch.device
) -> Strategy:
    groups = parameter_groups(model, config.optim)
    schedule_for = partial(make_scheduler, config=config.optim, schedule=schedule)
    if ds_config is None:
        optimizer = make_optimizer(groups, config.optim)
        return SingleStrategy(model, optimizer, schedule_for(optimizer), device=device, clip=config.optim.clip)
    from slidescale.engine.parallel.zero import ZeroStrategy  # DeepSpeed takes seconds to import

    return ZeroStrategy(
        model,
        groups,
        None if "optimizer" in ds_config else make_optimizer(groups, config.optim),
        None if "scheduler" in ds_config else schedule_for,
        ds_config=ds_config,
    )


def _read_ds_config(config: Config) -> dict[str, Any] | None:
    """ds.json, if there is one, after a first look at whether it agrees with the recipe."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if config.deepspeed_config is None:
        if ranks > 1:
            raise ConfigError(f"{ranks} ranks were started, which takes --deepspeed_config ds.json")
        return None
    content = read_ds_config(config.deepspeed_config)
    complete_ds_config(content, config, Schedule(0, 0), bf16=False)
    return content


def _demo_manifest(config: Config, group: TileGroup) -> Manifest:
    """The demo cohort's, drawn by the main rank where it is missing."""
    data = config.data
    folder = config.run.out / f"demo_cohort_{data.demo_slides}"
    log.info(
        "no --data.manifest given: training on the DEMO COHORT, %d slides that this program draws, in %s",
        data.demo_slides, folder,
    )  # fmt: skip
    if group.rank == 0:
        begin = time.perf_counter()
        negative, positive = data.classes
        write_demo_cohort(folder, slides=data.demo_slides, classes=(negative, positive))
        log.info("demo cohort ready (%.0f s)", time.perf_counter() - begin)
    group.barrier()
    return read_manifest(folder / "manifest.csv", data)


def _open_run_folder(config: Config, group: TileGroup) -> Path:
    """The same on every rank: the main one looks, and makes it."""
    answer: Path | UserError | None = None
    if group.rank == 0:
        try:
            answer = choose_run_folder(config.run.out, config.run.name, resume=config.resume)
            answer.mkdir(parents=True, exist_ok=True)
        except UserError as error:
            answer = error
        except OSError as error:
            answer = UserError(f"cannot make the run's folder: {error}")
    folder = group.gather_objects(answer)[0]
    if isinstance(folder, UserError):
        raise folder
    assert folder is not None
    return folder


def _resume(checkpoints: Checkpoints, strategy: Strategy, cohort: Cohort) -> Progress:
    if not checkpoints.exists():
        raise UserError(f"--resume: {checkpoints.folder} has no checkpoint; the run ended before its first epoch did")
    progress = checkpoints.load(strategy, "last")
    for slide_id, reason in progress.excluded.items():
        if slide_id in cohort.tilings and slide_id not in cohort.excluded:
            cohort.exclude(slide_id, reason)
    log.info("resumed after epoch %d (step %d)", progress.epoch, progress.step)
    return progress


def _describe(cohort: Cohort) -> None:
    for split in ("train", "val", "test"):
        if rows := cohort.usable(split):
            tiles = sorted(len(cohort.tilings[row.slide_id].coords) for row in rows)
            log.info(
                "%-5s %d slides, %s tissue tiles a slide (median %d)", split, len(rows),
                f"{tiles[0]} to {tiles[-1]}", tiles[len(tiles) // 2],
            )  # fmt: skip


def _count_parameters(model: torch.nn.Module) -> int:
    """Whole parameters also where ZeRO-3 has split them (`ds_numel`)."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
