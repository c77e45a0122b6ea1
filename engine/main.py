"""From a recipe's command line to a trained model."""

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import tyro

from slidescale.engine.checkpoint import Checkpoints, Progress
from slidescale.engine.config import Config, RunConfig
from slidescale.engine.data.bag import bag_size, epoch_size
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.features import FeatureReader, FeatureStore
from slidescale.engine.data.manifest import Manifest, read_manifest
from slidescale.engine.data.prefetch import TileReader
from slidescale.engine.data.synthetic import write_demo_cohort
from slidescale.engine.data.tiling import TileSpec
from slidescale.engine.ds_config import complete_ds_config, read_ds_config, uses_bf16
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.feed import Feed
from slidescale.engine.frozen import encode_cohort, fingerprint
from slidescale.engine.logger import RunLog, configure_logging
from slidescale.engine.memory.planner import Plan
from slidescale.engine.memory.run_plan import make_offload, plan_encoding, plan_run
from slidescale.engine.memory.two_pass import seeded
from slidescale.engine.memory.usage import GIB, keep_freed_memory, reset_peak, return_freed_memory
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder, GivenFeatures
from slidescale.engine.models.foundation import find_foundation_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.objective import Objective, fit_objective, make_objective
from slidescale.engine.parallel.mesh import (
    Mesh,
    check_launcher,
    is_main_rank,
    make_mesh,
    pick_device,
    start_world,
    stop_world,
)
from slidescale.engine.parallel.select import StrategyName, make_strategy, select_strategy
from slidescale.engine.parallel.strategy import Strategy
from slidescale.engine.run_folder import (
    check_same_settings,
    check_same_subject,
    find_run_folder,
    open_run_folder,
    read_record,
    record_run,
)
from slidescale.engine.schedule import make_schedule
from slidescale.engine.step import TrainStep
from slidescale.engine.trainer import Trainer, best_names
from slidescale.kernels.dispatch import KernelName, choose_kernels

log = logging.getLogger(__name__)

MakeModel = Callable[[Config], SlideModel]

# The launcher ends all ranks within a second of the first one's end, DeepSpeed's and torchrun's alike.
GRACE_S = 10.0


def main(
    description: str,
    *,
    default: Config,
    demo: Config,
    presets: Mapping[str, Config] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a recipe from the command line.

    Args:
        description: shown by --help.
        default: the recipe's settings when a manifest is given.
        demo: its settings without one, for the demo cohort.
        presets: other settings to start from with a manifest, by the name that --preset gives.
        argv: the command line; None takes the process's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    configure_logging(is_main_rank())
    try:
        base, argv = _choose_settings(argv, default, demo, presets or {})
        if presets:
            description += f"\n\n--preset NAME starts from other settings: {', '.join(presets)}."
        config = tyro.cli(Config, default=base, args=argv, description=description)
        run(config)
        stop_world()
    except UserError as error:
        exit_telling(error)


def has_manifest(argv: Sequence[str]) -> bool:
    """Whether a command line names the user's own slides."""
    return any(word.split("=")[0] == "--data.manifest" for word in argv)


def exit_telling(error: UserError) -> NoReturn:
    """End this process with an error of the input, which is told once over all ranks."""
    # What all ranks find alike, the main one tells at once, and the launcher then ends the others. A rank that is
    # still there after that has found it alone: a full disk, a machine without the manifest.
    if not is_main_rank():
        time.sleep(GRACE_S + int(os.environ.get("LOCAL_RANK", 0)))
    sys.exit(f"error: {error}")


def run(config: Config) -> Path:
    """Train as a config says.

    Returns:
        The run's folder.

    Raises:
        UserError: something about the input or the settings; no work is lost.
    """
    check_launcher()
    place = _choose_place(config)
    manifest = read_manifest(config.data.manifest, config.data) if config.data.manifest else None
    place = _meet(config, place)
    manifest = manifest or _demo_manifest(config, place.mesh)
    objective = _fit_objective(config, manifest)
    _choose_allocation(config, place.device)
    make = partial(make_model, classes=objective.outputs, bf16=place.bf16, kernels=place.kernels)
    model = make(config).to(place.device)
    _describe_encoder(config, model.encoder)
    frozen_encoder = _fingerprint_alike(model, place.mesh) if config.model.frozen else None
    folder = _find_or_open_run_folder(config, manifest.classes, frozen_encoder, place.mesh)
    if config.resume:
        objective = _resumed_objective(folder, place.mesh) or objective
    log.info(
        "run %s on %d × %s; watch it with: tensorboard --logdir %s", folder, place.mesh.world.size, place.device.type,
        config.run.out,
    )  # fmt: skip
    cohort, reader = _open_cohort(config, place, manifest, folder)
    if frozen_encoder is not None:
        reader = _encode_cohort(config, place, make, model, frozen_encoder, cohort, reader)
        model = model.without_encoder()
        reset_peak(place.device)  # training's own counts from here
    strategy, ds_config = _make_strategy(config, place, model, cohort)
    plan = _plan(config, place, make, strategy, ds_config, cohort)
    checkpoints = Checkpoints(folder / "checkpoints", place.mesh.world)
    progress = Progress(slides_a_step=_slides_a_step(config, place.mesh), excluded={})
    if config.resume:
        progress = _resume(checkpoints, strategy, cohort, progress.slides_a_step)
    if place.mesh.world.rank == 0:
        record_run(folder, config, ds_config, manifest.classes, objective, frozen_encoder)
    _train(config, place, cohort, reader, strategy, objective.to(place.device), plan, checkpoints, progress, folder)
    log.info("results in %s: predictions.csv, metrics.json, figures/, heatmaps/, model.safetensors", folder)
    return folder


def make_model(config: Config, *, classes: int, bf16: bool, kernels: KernelName) -> SlideModel:
    """Encoder and aggregator, initialised from the run's seed."""
    settings = config.model
    with seeded(torch.device("cpu"), config.run.seed, "model"):
        encoder = Encoder(
            settings.encoder,
            tile_px=config.data.tile_px,
            pretrained=settings.pretrained,
            weights=settings.weights,
            drop_path=settings.drop_path,
            lora_rank=settings.lora_rank,
            augment_symmetry=config.data.augment_symmetry,
            stain_jitter=config.data.stain_jitter,
            kernels=kernels,
        )
        encoder.set_checkpointing(config.memory.checkpoint_blocks)
        aggregator = Aggregator(
            encoder.dim,
            classes,
            pooling=settings.pooling,
            hidden_dim=settings.hidden_dim,
            attention_dim=settings.attention_dim,
            attention_branches=settings.attention_branches,
            attention_dropout=settings.attention_dropout,
            dropout=settings.dropout,
            slide_norm=settings.slide_norm,
            transformer_layers=settings.transformer_layers,
            transformer_heads=settings.transformer_heads,
            transformer_spread=settings.transformer_spread,
            kernels=kernels,
        )
    return SlideModel(encoder, aggregator, autocast=torch.bfloat16 if bf16 else None)


def _choose_settings(
    argv: list[str], default: Config, demo: Config, presets: Mapping[str, Config]
) -> tuple[Config, list[str]]:
    """The settings that the command line begins with, and the command line without --preset.

    Raises:
        ConfigError: no such preset, or no manifest for it.
    """
    is_study = has_manifest(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        raise ConfigError(f"--preset: name one of {', '.join(presets) or 'none, for this recipe has none'}") from None
    if given.preset is None:
        return default if is_study else demo, rest
    if given.preset not in presets:
        known = f"presets are: {', '.join(presets)}" if presets else "this recipe has no presets"
        raise ConfigError(f"--preset {given.preset}: {known}")
    if not is_study and not {"--help", "-h"} & set(rest):
        raise ConfigError(f"--preset {given.preset} is for a study's slides: give --data.manifest slides.csv")
    return presets[given.preset], rest


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a run computes, and in which arithmetic.

    Attributes:
        bf16: whether matrix products are in bf16.
        ds_content: of ds.json, as it was read; None without one.
        mesh: this process alone, until the ranks have met.
    """

    device: torch.device
    strategy: StrategyName
    bf16: bool
    kernels: KernelName
    ds_content: dict[str, Any] | None
    mesh: Mesh = field(default_factory=Mesh)


def _choose_place(config: Config) -> _Place:
    """What can be chosen before the ranks meet, so that what does not go together is told at once."""
    device = pick_device(max(0, int(os.environ.get("LOCAL_RANK", config.local_rank))))
    strategy = select_strategy(config, ranks=int(os.environ.get("WORLD_SIZE", 1)))
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and has_bf16(device))
    ds_content = read_ds_config(config.deepspeed_config) if config.deepspeed_config else None
    if ds_content is not None:
        bf16 = uses_bf16(complete_ds_config(ds_content, config, None, bf16=bf16))
    try:
        kernels = choose_kernels(config.run.kernels, device)
    except ValueError as error:
        raise ConfigError(f"--run.kernels: {error}") from None
    return _Place(device=device, strategy=strategy, bf16=bf16, kernels=kernels, ds_content=ds_content)


def _meet(config: Config, place: _Place) -> _Place:
    """The place with its ranks, which have met, unless one process trains alone."""
    if place.strategy == "single":
        return place
    start_world(place.device)
    mesh = make_mesh(place.device, config.parallel.tile_ranks)
    _check_alike(config, mesh)
    return replace(place, mesh=mesh)


def _check_alike(config: Config, mesh: Mesh) -> None:
    """Refuse ranks that were started with different settings, which would wait for each other for ever."""
    first, *others = mesh.world.gather_objects(config.flat() | {"local_rank": None})
    for rank, other in enumerate(others, start=1):
        different = [
            f"--{name.replace('_', '-')}: {first[name]!r} and {other[name]!r}"
            for name in first
            if first[name] != other[name]
        ]
        if different:
            raise ConfigError(f"ranks 0 and {rank} were started with different settings:\n  " + "\n  ".join(different))


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


def _describe_encoder(config: Config, encoder: Encoder | GivenFeatures) -> None:
    settings = config.model
    known = find_foundation_model(settings.encoder)
    if known:
        log.info("encoder %s: %s; licence: %s", known[0], known[1].source, known[1].licence)
    if settings.pretrained or settings.weights:
        return
    if settings.lora_rank:
        log.warning(
            "--model.lora-rank trains adapters of %s, whose own weights stay as they are, and these are random: "
            "use --model.pretrained or --model.weights",
            settings.encoder,
        )
    if known:
        log.warning("%s has random weights: use --model.pretrained or --model.weights", settings.encoder)
    elif settings.frozen:
        log.warning(
            "--model.frozen keeps %s as it is, and its weights are random: use --model.pretrained or --model.weights",
            settings.encoder,
        )
    elif encoder.has_batch_norm() and not settings.slide_norm:
        log.warning(
            "%s has BatchNorm layers, whose statistics never train here, and random weights: it will hardly learn. "
            "Use pretrained weights, an encoder with other normalisation (resnet50_gn), or --model.slide-norm",
            settings.encoder,
        )


def _fit_objective(config: Config, manifest: Manifest) -> Objective:
    weights, names = config.optim.class_weights, manifest.classes
    if weights:
        if manifest.supervision not in ("classes", "multi_label"):
            raise ConfigError(
                f"--optim.class-weights is {weights}: is for --data.supervision classes and multi_label, and that is "
                f"{manifest.supervision}"
            )
        if len(weights) != len(names):
            what = "classes" if manifest.supervision == "classes" else "labels"
            raise ConfigError(f"optim.class_weights has {len(weights)} values for {len(names)} {what}: {names}")
    return fit_objective(
        manifest.supervision,
        len(names),
        [row.target for row in manifest.split("train")],
        class_weights=weights,
        survival_bins=config.data.survival_bins,
    )


def _choose_allocation(config: Config, device: torch.device) -> None:
    """Before the model is built, what a CPU's memory does when it is freed."""
    if device.type == "cpu":
        # What is resident keeps to a budget, or else what was used once is used again, which is faster.
        has_limit = config.memory.budget != "auto" or config.memory.policy == "offload"
        (return_freed_memory if has_limit else keep_freed_memory)()


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
        data.demo_slides, folder,
    )  # fmt: skip
    if mesh.world.rank == 0:
        begin = time.perf_counter()
        classes = (data.classes[0], data.classes[1])
        write_demo_cohort(folder, slides=data.demo_slides, classes=classes, foci=data.demo_foci)
        log.info("demo cohort ready (%.0f s)", time.perf_counter() - begin)
    mesh.world.barrier()
    return read_manifest(folder / "manifest.csv", data)


def _find_or_open_run_folder(config: Config, classes: tuple[str, ...], frozen_encoder: str | None, mesh: Mesh) -> Path:
    """The run's folder, the same on every rank: the main one looks, and makes it."""

    def find_or_open() -> Path:
        if not config.resume:
            try:
                return open_run_folder(config.run.out, config.run.name)
            except OSError as error:
                raise UserError(f"cannot make the run's folder: {error}") from None
        folder = find_run_folder(config.run.out, config.run.name)
        check_same_settings(folder, config)
        check_same_subject(folder, classes, frozen_encoder)
        return folder

    return mesh.world.ask_main(find_or_open)


def _open_cohort(config: Config, place: _Place, manifest: Manifest, folder: Path) -> tuple[Cohort, TileReader]:
    """The slides, of which every one's tissue has been found, and what reads their tiles."""
    data = config.data
    spec = TileSpec(
        tile_px=data.tile_px, mpp_um=data.mpp_um, min_tissue=data.min_tissue, default_mpp_um=data.default_mpp_um
    )
    cohort = Cohort(manifest, place.mesh.world, max_excluded=data.max_excluded, excluded_csv=folder / "excluded.csv")
    cohort.tile(spec, config.run.out / "tilings", threads=data.readers)
    _describe(cohort)
    return cohort, TileReader(spec, threads=data.readers, pin=place.device.type == "cuda")


def _describe(cohort: Cohort) -> None:
    manifest, names = cohort.manifest, cohort.manifest.classes
    if manifest.supervision == "classes":
        of = f"those of {names[1]}" if len(names) == 2 else "of each, and the mean"
        log.info(
            "classes: %s (--data.classes gives another order); probabilities and AUROC are %s", ", ".join(names), of
        )
    if not cohort.usable("val"):
        log.warning("no slide is in split 'val': no epoch can be chosen as the best, and the last one is kept")
    for split in ("train", "val", "test"):
        if rows := cohort.usable(split):
            tiles = sorted(len(cohort.tilings[row.slide_id].coords) for row in rows)
            log.info(
                "%-5s %d slides, %s tissue tiles a slide (median %d)", split, len(rows),
                f"{tiles[0]} to {tiles[-1]}", tiles[len(tiles) // 2],
            )  # fmt: skip


def _encode_cohort(
    config: Config,
    place: _Place,
    make: MakeModel,
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
        config.run.out / "features", reader.spec, encoder=model.encoder.name, fingerprint=frozen_encoder,
        precision="bf16" if place.bf16 else "fp32", dim=model.encoder.dim,
    )  # fmt: skip
    chunk = plan_encoding(config, make, mesh=place.mesh, device=place.device)
    encode_cohort(model, cohort, store, reader, place.mesh, chunk=chunk, device=place.device)
    reader.close()
    return FeatureReader(store, threads=config.data.readers, pin=place.device.type == "cuda")


def _slides_a_step(config: Config, mesh: Mesh) -> int:
    """Of an optimizer step, over all ranks."""
    return mesh.slides * config.optim.accumulate


def _slides_an_epoch(config: Config, cohort: Cohort) -> int:
    return epoch_size(len(cohort.usable("train")), config.data.epoch_share)


def _make_strategy(
    config: Config, place: _Place, model: SlideModel, cohort: Cohort
) -> tuple[Strategy, dict[str, Any] | None]:
    """The model in the hands of its strategy, and ds.json as completed."""
    slides_a_step = _slides_a_step(config, place.mesh)
    schedule = make_schedule(config, steps_an_epoch=math.ceil(_slides_an_epoch(config, cohort) / slides_a_step))
    ds_config = None
    if place.ds_content is not None:
        ds_config = complete_ds_config(place.ds_content, config, schedule, bf16=place.bf16)
    strategy = make_strategy(
        place.strategy, model, config, schedule, place.mesh, place.device, ds_config=ds_config, bf16=place.bf16
    )
    log.info(
        "%s (%.1f M parameters) + %s, %s, %s%s; kernels: %s", "frozen " * config.model.frozen + config.model.encoder,
        _count_parameters(model) / 1e6, config.model.pooling, "bf16 autocast" if place.bf16 else "fp32", strategy.name,
        f", {slides_a_step} slides a step" if slides_a_step > 1 else "", place.kernels,
    )  # fmt: skip
    return strategy, ds_config


def _count_parameters(model: torch.nn.Module) -> int:
    """Whole parameters also where ZeRO-3 has split them (`ds_numel`)."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _plan(
    config: Config,
    place: _Place,
    make: MakeModel,
    strategy: Strategy,
    ds_config: dict[str, Any] | None,
    cohort: Cohort,
) -> Plan:
    """What of a step is kept in memory, for the largest bag."""
    return plan_run(
        config,
        (lambda settings: make(settings).without_encoder()) if config.model.frozen else make,
        strategy=strategy.name,
        ds_config=ds_config,
        k=max(bag_size(cohort.tilings[row.slide_id], config.data.k) for row in cohort.usable("train")),
        mesh=place.mesh,
        device=place.device,
    )


def _resume(checkpoints: Checkpoints, strategy: Strategy, cohort: Cohort, slides_a_step: int) -> Progress:
    progress = checkpoints.load(strategy, "last")
    if progress.slides_a_step != slides_a_step:
        raise UserError(
            f"--resume: the run was begun with {progress.slides_a_step} slides a step, and this is {slides_a_step} "
            "(tile groups side by side × --optim.accumulate): choose ranks, --parallel.tile-ranks and "
            "--optim.accumulate so that it is the same"
        )
    for slide_id, reason in progress.excluded.items():
        if slide_id in cohort.tilings and slide_id not in cohort.excluded:
            cohort.exclude(slide_id, reason)
    log.info("resumed after epoch %d (step %d)", progress.epoch, progress.step)
    return progress


def _train(
    config: Config,
    place: _Place,
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
    offload = make_offload(config, folder, place.mesh, place.device)
    train_step = TrainStep(strategy, objective, place.mesh, chunk=plan.chunk, offload=offload)
    feed = Feed(config, cohort, reader, place.mesh, plan)
    slides = _slides_an_epoch(config, cohort)  # a resume may have set some aside
    run_log = RunLog(
        folder, main=place.mesh.world.rank == 0, slides=config.run.epochs * slides, done=progress.epoch * slides,
        step=progress.step,
    )  # fmt: skip
    run_log.hyperparameters(
        config.flat(), Config(run=RunConfig(name=config.run.name)).flat(), best_names(config.data.supervision)
    )
    try:
        Trainer(config, cohort, feed, train_step, reader, checkpoints, run_log, folder, plan.peak / GIB).fit(progress)
        run_log.finished()
    finally:
        reader.close()
        run_log.close()
        if offload:
            offload.close()


def has_bf16(device: torch.device) -> bool:
    """Whether the device runs bf16 matrix products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
