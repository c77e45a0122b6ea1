"""A run: from a config to a trained model."""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from slidescale.engine.config import Config, RunConfig
from slidescale.engine.data.bag import bag_size, epoch_size
from slidescale.engine.data.cohort import Cohort, Fault
from slidescale.engine.data.demo_cohort import write_demo_cohort
from slidescale.engine.data.features import FeatureReader, FeatureStore
from slidescale.engine.data.manifest import Manifest, read_manifest
from slidescale.engine.data.prefetch import TileReader
from slidescale.engine.data.tiling import TileSpec
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.memory.fake_model import meta_copy
from slidescale.engine.memory.planner import Plan
from slidescale.engine.memory.usage import reset_peak
from slidescale.engine.models.make import describe_encoder, make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh, check_launcher
from slidescale.engine.process.stopping import AGAIN, RESUME, note
from slidescale.engine.strategies.ds_config import complete_ds_config
from slidescale.engine.strategies.held import Holding, optimizer_of
from slidescale.engine.strategies.make import make_strategy
from slidescale.engine.strategies.schedule import make_schedule
from slidescale.engine.strategies.strategy import Strategy
from slidescale.engine.supervision.make import check_settings, fit_objective, make_objective, supervision_of
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.training.checkpoint import Checkpoints, Progress, epoch_name
from slidescale.engine.training.feed import Feed
from slidescale.engine.training.frozen import encode_cohort, fingerprint
from slidescale.engine.training.place import Place, choose_allocation, choose_place, meet
from slidescale.engine.training.plan import make_offload, measure_model, plan_encoding, plan_step
from slidescale.engine.training.run_folder import (
    check_same_settings,
    check_same_subject,
    find_run_folder,
    open_run_folder,
    read_record,
    record_run,
)
from slidescale.engine.training.run_log import RunLog
from slidescale.engine.training.run_slides import check_same_slides, record_slides
from slidescale.engine.training.step import TrainStep
from slidescale.engine.training.trainer import Trainer, best_names
from slidescale.engine.units import GIB

log = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Train as a config says.

    Returns:
        The run's folder.

    Raises:
        UserError: something about the input or the settings; no work is lost.
    """
    note("before the first epoch", RESUME if config.resume else AGAIN)
    check_launcher()
    check_settings(config.data, config.optim)
    place = choose_place(config)
    reset_peak(place.device)  # an earlier run's, of the same process
    manifest = read_manifest(config.data.manifest, config.data) if config.data.manifest else None
    place = meet(config, place)
    manifest = manifest or _demo_manifest(config, place.mesh)
    objective = fit_objective(manifest.classes, [row.target for row in manifest.split("train")], config)
    choose_allocation(config, place.device)
    model = make_model(config, classes=objective.outputs, bf16=place.bf16, kernels=place.kernels).to(place.device)
    describe_encoder(config, model.encoder)
    frozen_encoder = _fingerprint_alike(model, place.mesh) if config.model.frozen else None
    folder = _find_or_open_run_folder(config, manifest, frozen_encoder, place.mesh)
    if config.resume:
        objective = _resumed_objective(folder, place.mesh) or objective
    log.info(
        "run %s on %d × %s; watch it with: tensorboard --logdir %s",
        folder,
        place.mesh.world.size,
        place.device.type,
        config.run.out,
    )
    cohort, reader = _open_cohort(config, place, manifest, folder)
    if frozen_encoder is not None:
        reader = _encode_cohort(config, place, model, frozen_encoder, cohort, reader)
        model = model.without_encoder()
        reset_peak(place.device)  # training's own counts from here
    measured = meta_copy(model)
    strategy, ds_config = _make_strategy(config, place, model, cohort)
    plan = _plan(config, place, measured, reader, strategy, ds_config, cohort)
    checkpoints = Checkpoints(folder / "checkpoints", place.mesh.world, keep=config.run.keep_checkpoints)
    progress = Progress(slides_a_step=_slides_a_step(config, place.mesh), excluded={})
    if config.resume:
        progress = _resume(checkpoints, strategy, cohort, progress.slides_a_step)
    if place.mesh.world.rank == 0:
        record_run(folder, config, ds_config, manifest.classes, objective, frozen_encoder)
        record_slides(folder, manifest)
    _train(config, place, cohort, reader, strategy, objective.to(place.device), plan, checkpoints, progress, folder)
    log.info("results in %s: predictions.csv, metrics.json, figures/, heatmaps/, model.safetensors", folder)
    return folder


def _fingerprint_alike(model: SlideModel, mesh: Mesh) -> str:
    """Of the encoder, the same on every rank.

    Raises:
        UserError: ranks have loaded different weights.
    """
    first, *others = mesh.world.gather_objects(fingerprint(model.encoder))
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise UserError(
                f"ranks 0 and {rank} have different weights of the frozen encoder: --model.weights must be the same "
                "file, or the hub's cache the same, on every machine"
            )
    return first


def _resumed_objective(folder: Path, mesh: Mesh) -> Objective | None:
    """The objective that the run was begun with, whose scale or bins the manifest may no longer give.

    None for a run that was begun before it was recorded; such a run has classes, and needs only its settings.
    """
    record = mesh.world.ask_main(lambda: read_record(folder).get("objective"))
    return make_objective(record) if record else None


def _demo_manifest(config: Config, mesh: Mesh) -> Manifest:
    """The demo cohort's, drawn by the main rank where it is missing."""
    data = config.data
    if data.supervision != "classes":
        raise ConfigError(f"--data.supervision {data.supervision} needs --data.manifest: the demo cohort has classes")
    if len(data.classes) != 2:
        raise ConfigError(f"--data.classes: the demo cohort has two, not {len(data.classes)}")
    folder = config.run.out / f"demo_cohort_{data.demo_slides}{'_small_foci' * (data.demo_foci == 'small')}"
    log.info(
        "no --data.manifest given: training on the DEMO COHORT, %d slides that this program draws, in %s",
        data.demo_slides,
        folder,
    )
    if mesh.world.rank == 0:
        begin = time.perf_counter()
        classes = (data.classes[0], data.classes[1])
        write_demo_cohort(folder, slides=data.demo_slides, classes=classes, foci=data.demo_foci)
        log.info("demo cohort ready (%.0f s)", time.perf_counter() - begin)
    mesh.world.barrier()
    return read_manifest(folder / "manifest.csv", data)


def _find_or_open_run_folder(config: Config, manifest: Manifest, frozen_encoder: str | None, mesh: Mesh) -> Path:
    """The run's folder, the same on every rank: the main one looks, and makes it."""

    def find_or_open() -> Path:
        if not config.resume:
            try:
                return open_run_folder(config.run.out, config.run.name)
            except OSError as error:
                raise UserError(f"cannot make the run's folder: {error}") from None
        folder = find_run_folder(config.run.out, config.run.name)
        check_same_settings(folder, config)
        check_same_subject(folder, manifest.classes, frozen_encoder)
        check_same_slides(folder, manifest)
        return folder

    return mesh.world.ask_main(find_or_open)


def _open_cohort(config: Config, place: Place, manifest: Manifest, folder: Path) -> tuple[Cohort, TileReader]:
    """The slides, of which every one's tissue has been found, and what reads their tiles."""
    data = config.data
    spec = TileSpec(
        tile_px=data.tile_px, mpp_um=data.mpp_um, min_tissue=data.min_tissue, default_mpp_um=data.default_mpp_um
    )
    cohort = Cohort(manifest, place.mesh.world, max_excluded=data.max_excluded, excluded_csv=folder / "excluded.csv")
    cohort.tile(spec, config.run.out / "tilings", threads=data.readers)
    _describe(cohort)
    if config.model.slide_norm:
        _warn_of_single_tiles(cohort, data.k)
    return cohort, TileReader(spec, threads=data.readers, pin=place.device.type == "cuda")


def _describe(cohort: Cohort) -> None:
    manifest = cohort.manifest
    if words := supervision_of(manifest.supervision).describe(manifest.classes):
        log.info("%s", words)
    if not cohort.usable("val"):
        log.warning("no slide is in split 'val': no epoch can be chosen as the best, and the last one is kept")
    for split in ("train", "val", "test"):
        if rows := cohort.usable(split):
            tiles = sorted(len(cohort.tilings[row.slide_id].coords) for row in rows)
            log.info(
                "%-5s %d slides, %s tissue tiles a slide (median %d)",
                split,
                len(rows),
                f"{tiles[0]} to {tiles[-1]}",
                tiles[len(tiles) // 2],
            )


def _warn_of_single_tiles(cohort: Cohort, k: int | Literal["all"]) -> None:
    """Normalised over its tiles, a slide of one has no features: all such slides get one and the same prediction."""
    rows = [row for split in ("train", "val", "test") for row in cohort.usable(split)]
    tiles = {row.slide_id: len(cohort.tilings[row.slide_id].coords) for row in rows}
    single = [row.slide_id for row in rows if tiles[row.slide_id] == 1 or (k == 1 and row.split == "train")]
    if single:
        log.warning(
            "%d of %d slides have one tile (%s%s), which --model.slide-norm makes zeros: they are all predicted alike",
            len(single),
            len(rows),
            ", ".join(single[:3]),
            " …" if len(single) > 3 else "",
        )


def _encode_cohort(
    config: Config,
    place: Place,
    model: SlideModel,
    frozen_encoder: str,
    cohort: Cohort,
    reader: TileReader,
) -> FeatureReader:
    """What reads features, in place of tiles, once every slide has some.

    Args:
        frozen_encoder: its fingerprint.
        reader: of tiles; is closed.
    """
    store = FeatureStore(
        config.run.out / "features",
        reader.spec,
        encoder=model.encoder.name,
        fingerprint=frozen_encoder,
        precision="bf16" if place.bf16 else "fp32",
        dim=model.encoder.dim,
    )
    chunk = plan_encoding(model, reader.blank(1)[0], config.memory, mesh=place.mesh)
    encode_cohort(model, cohort, store, reader, place.mesh, chunk=chunk, device=place.device)
    reader.close()
    return FeatureReader(store, threads=config.data.readers, pin=place.device.type == "cuda")


def _slides_a_step(config: Config, mesh: Mesh) -> int:
    """Of an optimizer step, over all ranks."""
    return mesh.slides * config.optim.accumulate


def _slides_an_epoch(config: Config, cohort: Cohort) -> int:
    return epoch_size(len(cohort.expected("train")), config.data.epoch_share)


def _make_strategy(
    config: Config, place: Place, model: SlideModel, cohort: Cohort
) -> tuple[Strategy, dict[str, Any] | None]:
    """The model in the hands of its strategy, and ds.json as completed."""
    slides_a_step = _slides_a_step(config, place.mesh)
    schedule = make_schedule(config, steps_an_epoch=math.ceil(_slides_an_epoch(config, cohort) / slides_a_step))
    ds_config = None
    if place.ds_content is not None:
        ds_config = complete_ds_config(place.ds_content, config, schedule, bf16=place.bf16, width=model.encoder.dim)
    strategy = make_strategy(
        place.strategy, model, config, schedule, place.mesh, place.device, ds_config=ds_config, bf16=place.bf16
    )
    log.info(
        "%s (%.1f M parameters) + %s, %s, %s%s; kernels: %s",
        "frozen " * config.model.frozen + config.model.encoder,
        _count_parameters(model) / 1e6,
        config.model.pooling,
        "bf16 autocast" if place.bf16 else "fp32",
        strategy.name,
        f", {slides_a_step} slides a step" if slides_a_step > 1 else "",
        place.kernels,
    )
    return strategy, ds_config


def _count_parameters(model: torch.nn.Module) -> int:
    """Whole parameters also where ZeRO-3 has split them (`ds_numel`)."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _plan(
    config: Config,
    place: Place,
    measured: SlideModel,
    reader: TileReader,
    strategy: Strategy,
    ds_config: dict[str, Any] | None,
    cohort: Cohort,
) -> Plan:
    """What of a step is kept in memory, for the largest bag.

    Args:
        measured: the model as it was before its strategy had it.
    """
    k = max(bag_size(cohort.tilings[row.slide_id], config.data.k) for row in cohort.usable("train"))
    footprint = measure_model(measured, reader.blank(1), config.memory, k=k, mesh=place.mesh)
    holding = Holding.of(config.parallel, strategy.name, ds_config, place.mesh, optimizer_of(config.optim, ds_config))
    return plan_step(footprint, config.memory, holding, k=k, prefetch=config.data.prefetch, mesh=place.mesh)


def _resume(checkpoints: Checkpoints, strategy: Strategy, cohort: Cohort, slides_a_step: int) -> Progress:
    progress = checkpoints.load(strategy, "last")
    if progress.slides_a_step != slides_a_step:
        raise UserError(
            f"--resume: the run was begun with {progress.slides_a_step} slides a step, and this is {slides_a_step} "
            "(tile groups side by side × --optim.accumulate): choose ranks, --parallel.tile-ranks and "
            "--optim.accumulate so that it is the same"
        )
    known = {row.slide_id for row in cohort.manifest.rows}
    cohort.exclude(*(Fault(*item) for item in progress.excluded.items() if item[0] in known))
    folder = checkpoints.folder / epoch_name(progress.epoch)
    log.info("resumed after epoch %d (step %d), from %s", progress.epoch, progress.step, folder)
    return progress


def _train(
    config: Config,
    place: Place,
    cohort: Cohort,
    reader: TileReader,
    strategy: Strategy,
    objective: Objective,
    plan: Plan,
    checkpoints: Checkpoints,
    progress: Progress,
    folder: Path,
) -> None:
    """Train, and leave nothing open, whatever happens."""
    memory = config.memory
    if memory.policy == "offload" and memory.offload_folder is None:
        memory = replace(memory, offload_folder=folder / "offload")
    offload = make_offload(memory, place.mesh)
    train_step = TrainStep(strategy, objective, place.mesh, chunk=plan.chunk, offload=offload)
    feed = Feed(config, cohort, reader, place.mesh, plan)
    slides = _slides_an_epoch(config, cohort)  # a resume may have set some aside
    run_log = RunLog(
        folder,
        main=place.mesh.world.rank == 0,
        slides=config.run.epochs * slides,
        done=progress.epoch * slides,
        step=progress.step,
        again=progress.unreported is not None and bool(progress.unreported.last_scalars),
    )
    headline = supervision_of(config.data.supervision).headline
    run_log.hyperparameters(
        config.flat(),
        Config(run=RunConfig(name=config.run.name)).flat(),
        best_names(headline),
        headline,
    )
    try:
        Trainer(config, cohort, feed, train_step, reader, checkpoints, run_log, folder, plan.peak / GIB).fit(progress)
        run_log.finished()
    finally:
        reader.close()
        run_log.close()
        if offload:
            offload.close()
