"""A run: from a config to a trained model."""

import logging
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.api import SlideStep, make_step
from slidescale.engine.config import Config, RunConfig
from slidescale.engine.data.bag import bag_size, epoch_size
from slidescale.engine.data.cohort import Cohort, Fault
from slidescale.engine.data.demo_cohort import write_demo_cohort
from slidescale.engine.data.features import FeatureReader, FeatureStore
from slidescale.engine.data.manifest import Manifest, read_manifest
from slidescale.engine.data.prefetch import TileReader
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.memory.usage import reset_peak
from slidescale.engine.models.make import describe_encoder, make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.mesh import Mesh, check_launcher
from slidescale.engine.process.stopping import AGAIN, RESUME, note
from slidescale.engine.strategies.ds_config import complete_ds_config
from slidescale.engine.strategies.make import Optimizing
from slidescale.engine.strategies.schedule import make_schedule
from slidescale.engine.strategies.strategy import Strategy
from slidescale.engine.supervision.make import check_settings, fit_objective, make_objective, supervision_of
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.training.checkpoint import Checkpoints, Progress, epoch_name
from slidescale.engine.training.feed import Feed
from slidescale.engine.training.frozen import encode_cohort, fingerprint
from slidescale.engine.training.place import Place, choose_allocation, choose_place, meet
from slidescale.engine.training.plan import plan_encoding
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
from slidescale.engine.training.slides import open_cohort
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
    objective = (_recorded_objective(config, place.mesh) if config.resume else None) or _fit_objective(config, manifest)
    choose_allocation(config, place.device)
    model = make_model(config, classes=objective.outputs, bf16=place.bf16, kernels=place.kernels).to(place.device)
    describe_encoder(config, model.encoder)
    frozen_encoder = _fingerprint_alike(model, place.mesh) if config.model.frozen else None
    folder = _find_or_open_run_folder(config, manifest, frozen_encoder, place.mesh)
    log.info(
        "run %s on %d × %s; watch it with: tensorboard --logdir %s",
        folder,
        place.mesh.world.size,
        place.device.type,
        config.run.out,
    )
    with ExitStack() as closing:
        cohort, reader = open_cohort(config, manifest, folder, place.mesh)
        closing.callback(reader.close)
        if frozen_encoder is not None:
            tiles, reader = reader, _encode_cohort(config, place, model, frozen_encoder, cohort, reader)
            tiles.close()
            closing.callback(reader.close)
            model = model.without_encoder()
            reset_peak(place.device)  # the peak of training counts from here
        step, ds_config = _make_step(config, place, model, objective.to(place.device), cohort, folder)
        closing.callback(step.close)
        plan = step.prepare(reader.blank(1), _largest_bag(config, cohort), prefetch=config.data.prefetch)
        checkpoints = Checkpoints(folder / "checkpoints", place.mesh.world, keep=config.run.keep_checkpoints)
        progress = Progress(slides_a_step=_slides_per_step(config, place.mesh), excluded={})
        if config.resume:
            progress = _resume(checkpoints, step.strategy, cohort, progress.slides_a_step)
        if place.mesh.world.rank == 0:
            record_run(folder, config, ds_config, manifest.classes, objective, frozen_encoder)
            record_slides(folder, manifest)
        run_log = _open_log(config, folder, cohort, progress, place.mesh)
        closing.callback(run_log.close)
        feed = Feed(config, cohort, reader, place.mesh)
        trainer = Trainer(
            config, cohort, feed, step.train_step, objective, reader, checkpoints, run_log, folder, plan.peak / GIB
        )
        trainer.fit(progress)
        run_log.finished()
    log.info("results in %s: predictions.csv, metrics.json, figures/, heatmaps/, model.safetensors", folder)
    return folder


def _fingerprint_alike(model: SlideModel, mesh: Mesh) -> str:
    """The fingerprint of the encoder, the same on every rank.

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


def _fit_objective(config: Config, manifest: Manifest) -> Objective:
    return fit_objective(manifest.classes, [row.target for row in manifest.split("train")], config)


def _recorded_objective(config: Config, mesh: Mesh) -> Objective | None:
    """The objective that the run was begun with, whose scale or bins the manifest may no longer give.

    None for a run that was begun before it was recorded; such a run has classes, and needs only its settings.
    """
    record = mesh.world.ask_main(lambda: read_record(find_run_folder(config.run.out, config.run.name)).get("objective"))
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


def _encode_cohort(
    config: Config, place: Place, model: SlideModel, fingerprint: str, cohort: Cohort, reader: TileReader
) -> FeatureReader:
    """Encode every slide that has no features yet, and return what reads features in place of tiles.

    Args:
        fingerprint: of the encoder.
        reader: of tiles.
    """
    store = FeatureStore(
        config.run.out / "features",
        reader.spec,
        encoder=model.encoder.name,
        fingerprint=fingerprint,
        precision="bf16" if place.bf16 else "fp32",
        dim=model.encoder.dim,
    )
    chunk = plan_encoding(model, reader.blank(1)[0], config.memory, mesh=place.mesh)
    encode_cohort(model, cohort, store, reader, place.mesh, chunk=chunk, device=place.device)
    return FeatureReader(store, threads=config.data.readers, pin=place.device.type == "cuda")


def _slides_per_step(config: Config, mesh: Mesh) -> int:
    """Slides of an optimizer step, over all ranks."""
    return mesh.slides * config.optim.accumulate


def _make_step(
    config: Config, place: Place, model: SlideModel, objective: Objective, cohort: Cohort, folder: Path
) -> tuple[SlideStep, dict[str, Any] | None]:
    """The training step, and ds.json as completed."""
    per_step = _slides_per_step(config, place.mesh)
    slides = epoch_size(len(cohort.expected("train")), config.data.epoch_share)
    schedule = make_schedule(config, steps_an_epoch=math.ceil(slides / per_step))
    ds_config = None
    if place.ds_content is not None:
        ds_config = complete_ds_config(place.ds_content, config, schedule, bf16=place.bf16, width=model.encoder.dim)
    memory = config.memory
    on_disk = folder / "offload" if memory.policy == "offload" else None
    step = make_step(
        model,
        Optimizing.as_settings_say(config.optim, schedule, ds_config),
        objective,
        mesh=place.mesh,
        strategy=place.strategy,
        ds_config=ds_config,
        parallel=config.parallel,
        clip=config.optim.clip,
        chunk=memory.chunk,
        budget=memory.budget,
        policy=memory.policy,
        offload_folder=memory.offload_folder or on_disk,
        offload_to=memory.offload_to,
    )
    log.info(
        "%s (%.1f M parameters) + %s, %s, %s%s; kernels: %s",
        "frozen " * config.model.frozen + config.model.encoder,
        _count_parameters(model) / 1e6,
        config.model.aggregator or config.model.pooling,
        "bf16 autocast" if place.bf16 else "fp32",
        step.strategy.name,
        f", {per_step} slides per step" if per_step > 1 else "",
        place.kernels,
    )
    return step, ds_config


def _count_parameters(model: torch.nn.Module) -> int:
    """Whole parameters also where ZeRO-3 has split them (`ds_numel`)."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _largest_bag(config: Config, cohort: Cohort) -> int:
    return max(bag_size(cohort.tilings[row.slide_id], config.data.k) for row in cohort.usable("train"))


def _resume(checkpoints: Checkpoints, strategy: Strategy, cohort: Cohort, slides_per_step: int) -> Progress:
    progress = checkpoints.load(strategy, "last")
    if progress.slides_a_step != slides_per_step:
        raise UserError(
            f"--resume: the run was begun with {progress.slides_a_step} slides per step, and this is {slides_per_step} "
            "(tile groups side by side × --optim.accumulate): choose ranks, --parallel.tile-ranks and "
            "--optim.accumulate so that it is the same"
        )
    known = {row.slide_id for row in cohort.manifest.rows}
    cohort.exclude(*(Fault(*item) for item in progress.excluded.items() if item[0] in known))
    folder = checkpoints.folder / epoch_name(progress.epoch)
    log.info("resumed after epoch %d (step %d), from %s", progress.epoch, progress.step, folder)
    return progress


def _open_log(config: Config, folder: Path, cohort: Cohort, progress: Progress, mesh: Mesh) -> RunLog:
    slides = epoch_size(len(cohort.expected("train")), config.data.epoch_share)  # a resume may have set some aside
    run_log = RunLog(
        folder,
        main=mesh.world.rank == 0,
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
    return run_log
