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
from slidescale.engine.run_folder import check_same_settings, find_run_folder, open_run_folder, record_run
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
        stop_world()
    except UserError as error:
        # What is wrong with the input is found by all ranks alike, so one of them tells.
        if is_main_rank():
            sys.exit(f"error: {error}")
        time.sleep(GRACE_S)
        sys.exit(1)


def run(config: Config) -> Path:
    """Train as a config says.

    Returns:
        The run's folder.

    Raises:
        UserError: something about the input or the settings; no work is lost.
    """
    device = pick_device(max(0, int(os.environ.get("LOCAL_RANK", config.local_rank))))
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and _has_bf16(device))
    ds_content = _read_ds_config(config)
    if ds_content is not None:
        bf16 = uses_bf16(complete_ds_config(ds_content, config, None, bf16=bf16))
    manifest = read_manifest(config.data.manifest, config.data) if config.data.manifest else None
    group = start_world(device) if ds_content is not None else TileGroup()
    manifest = manifest or _demo_manifest(config, group)
    weights, classes = config.optim.class_weights, manifest.classes
    if weights and len(weights) != len(classes):
        raise ConfigError(f"optim.class_weights has {len(weights)} values for {len(classes)} classes: {classes}")
    model = make_model(config, classes=len(classes), bf16=bf16).to(device)
    folder = _find_or_open_run_folder(config, group)
    log.info(
        "run %s on %d × %s; watch it with: tensorboard --logdir %s", folder, group.size, device.type, config.run.out
    )

    data = config.data
    spec = TileSpec(
        tile_px=data.tile_px, mpp_um=data.mpp_um, min_tissue=data.min_tissue, default_mpp_um=data.default_mpp_um
    )
    cohort = Cohort(manifest, group, max_excluded=data.max_excluded, excluded_csv=folder / "excluded.csv")
    cohort.tile(spec, config.run.out / "tilings", threads=data.readers)
    _describe(cohort)

    steps = len(cohort.usable("train"))
    schedule = Schedule(round(config.optim.warmup_epochs * steps), config.run.epochs * steps)
    ds_config = complete_ds_config(ds_content, config, schedule, bf16=bf16) if ds_content is not None else None
    strategy = _make_strategy(model, config, schedule, ds_config, device)
    log.info(
        "%s (%.1f M parameters) + %s, %s, %s", config.model.encoder, _count_parameters(model) / 1e6,
        config.model.pooling, "bf16 autocast" if bf16 else "fp32", strategy.name,
    )  # fmt: skip
    checkpoints = Checkpoints(folder / "checkpoints", group, strategy.name)
    progress = _resume(checkpoints, strategy, cohort) if config.resume else Progress(excluded={})
    if group.rank == 0:
        record_run(folder, config, ds_config, classes)
    reader = TileReader(spec, threads=data.readers, pin=device.type == "cuda")
    run_log = RunLog(folder, main=group.rank == 0, steps=schedule.total_steps, done=progress.step)
    objective = CrossEntropy(weights, len(classes)).to(device)
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
    """ds.json, if there is one."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if config.deepspeed_config is None:
        if ranks > 1:
            raise ConfigError(f"{ranks} ranks were started, which takes --deepspeed_config ds.json")
        return None
    return read_ds_config(config.deepspeed_config)


def _demo_manifest(config: Config, group: TileGroup) -> Manifest:
    """The demo cohort's, drawn by the main rank where it is missing."""
    data = config.data
    if len(data.classes) != 2:
        raise ConfigError(f"--data.classes: the demo cohort has two, not {len(data.classes)}")
    folder = config.run.out / f"demo_cohort_{data.demo_slides}"
    log.info(
        "no --data.manifest given: training on the DEMO COHORT, %d slides that this program draws, in %s",
        data.demo_slides, folder,
    )  # fmt: skip
    if group.rank == 0:
        begin = time.perf_counter()
        write_demo_cohort(folder, slides=data.demo_slides, classes=(data.classes[0], data.classes[1]))
        log.info("demo cohort ready (%.0f s)", time.perf_counter() - begin)
    group.barrier()
    return read_manifest(folder / "manifest.csv", data)


def _find_or_open_run_folder(config: Config, group: TileGroup) -> Path:
    """The run's folder, the same on every rank: the main one looks, and makes it."""
    answer: Path | UserError | None = None
    if group.rank == 0:
        try:
            if config.resume:
                answer = find_run_folder(config.run.out, config.run.name)
                check_same_settings(answer, config)
            else:
                answer = open_run_folder(config.run.out, config.run.name)
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
    """Whether the device runs bf16 matrix products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
