"""`slidescale predict`: predictions of a trained run, from all tissue tiles of each slide."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from slidescale.engine.commands.requests import ComputeSettings, PredictRequest
from slidescale.engine.commands.trained import TrainedRun, load_run
from slidescale.engine.data.labels import Labels, read_labels
from slidescale.engine.data.manifest import NamedFile, read_files
from slidescale.engine.data.prefetch import TileReader
from slidescale.engine.data.slide import Slide, open_slide
from slidescale.engine.data.tiling import TileSpec, Tiling, tile_slide
from slidescale.engine.errors import ConfigError, SlideError, UserError
from slidescale.engine.evaluation.attention import write_attention
from slidescale.engine.evaluation.intervals import estimate
from slidescale.engine.evaluation.metrics import Judged
from slidescale.engine.evaluation.predictions import run_model
from slidescale.engine.evaluation.results import draw_figures, write_metrics
from slidescale.engine.files import check_output, write_csv
from slidescale.engine.logger import Meter
from slidescale.engine.memory.planner import CHUNK_CAP
from slidescale.engine.parallel.mesh import Mesh, check_launcher, join, pick_device
from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.process import stopping
from slidescale.engine.supervision.make import supervision_of
from slidescale.engine.training.run_slides import known_splits
from slidescale.engine.training.weights import WEIGHTS

log = logging.getLogger(__name__)


class SlidePrediction(NamedTuple):
    """The result of `Objective.predict` `[O]`, and the weight of each of the tiling's N tiles `[N]`, summing to 1.

    The weights are None where the run's aggregator gives none.
    """

    file: NamedFile
    tiling: Tiling
    output: np.ndarray
    weights: np.ndarray | None


def attention_of(answer: SlidePrediction, run: TrainedRun) -> np.ndarray:
    """The weights of the tiles of a slide, for a picture.

    Raises:
        SlideError: the run's aggregator gives none.
    """
    if answer.weights is None:
        raise SlideError(f"{run.folder}: its aggregator, {run.config.model.aggregator}, gives tiles no weights to draw")
    return answer.weights


class Failure(NamedTuple):
    """A slide that cannot be predicted, and why."""

    file: NamedFile
    reason: str


class Predictor:
    """A trained run, and the ranks that share its work, each with the whole model.

    Args:
        mesh: one group of ranks, which share the tiles of each slide.
        device: where this rank computes, and the model is.
    """

    def __init__(self, run: TrainedRun, settings: ComputeSettings, mesh: Mesh, device: torch.device) -> None:
        self.run = run
        self.mesh = mesh
        self._device = device
        self._chunk = settings.chunk or CHUNK_CAP[device.type]
        self._readers = settings.readers
        data = run.config.data
        self.spec = TileSpec(
            tile_px=data.tile_px,
            mpp_um=data.mpp_um,
            min_tissue=data.min_tissue,
            default_mpp_um=settings.default_mpp_um or data.default_mpp_um,
        )

    def predict(self, files: Sequence[NamedFile]) -> Iterator[SlidePrediction | Failure]:
        """Predict each slide, or give the reason why not, alike on every rank; every rank must take all of them."""
        tilings: dict[str, Tiling] = {}
        for file, found in zip(files, self._tile(files), strict=True):
            if isinstance(found, Tiling):
                tilings[file.slide_id] = found
                for doubt in found.doubts:
                    log.warning("%s", doubt)
            else:
                yield Failure(file, found)
        reader = TileReader(self.spec, threads=self._readers, pin=self._device.type == "cuda")
        try:
            rows = [file for file in files if file.slide_id in tilings]
            for output in run_model(
                self.run.model, rows, tilings, reader, self.mesh, self._chunk, self._device, "predicting"
            ):
                faults = [fault for fault in self.mesh.world.gather_objects(output.fault) if fault is not None]
                answer = self.run.objective.predict(output.logits).cpu().numpy()
                if faults:
                    yield Failure(output.row, faults[0].reason)
                elif not np.isfinite(answer).all():
                    yield Failure(output.row, f"the model's answer is not finite: {answer}")
                else:
                    yield SlidePrediction(output.row, tilings[output.row.slide_id], answer, output.weights)
        finally:
            reader.close()

    def says(self, answer: SlidePrediction) -> str:
        """The prediction of a slide in words."""
        return supervision_of(self.run.config.data.supervision).output_words(self.run.classes, answer.output)

    def open(self, file: NamedFile) -> Slide:
        """Open a slide as it is opened for its tiles."""
        return open_slide(file.path, default_mpp_um=self.spec.default_mpp_um, mpp_um=file.mpp_um)

    def _tile(self, files: Sequence[NamedFile]) -> list[Tiling | str]:
        """Find the tiles of every slide, or the reason why not; each rank finds those of its share of the slides."""
        world = self.mesh.world
        meter = Meter("finding tissue", len(files), "slide", main=world.rank == 0)
        with ThreadPoolExecutor(self._readers) as pool:
            found = pool.map(partial(_try_tiling, spec=self.spec), files[world.rank :: world.size])
            mine = list(meter.count(found, world.size))
        parts = world.gather_objects(mine)
        return [parts[index % world.size][index // world.size] for index in range(len(files))]


def start_predictor(folder: Path, settings: ComputeSettings) -> Predictor:
    """Load a run on the device of this process, and meet the other ranks if a launcher has started some.

    Raises:
        UserError: see `load_run` and `join`.
    """
    check_launcher()
    device = pick_device()
    run = load_run(folder, device, settings.precision, settings.weights)
    return Predictor(run, settings, join(device=device), device)


def predict_slides(request: PredictRequest) -> None:
    """Predict slides and write a table, plus metrics and figures if the manifest has labels; the main rank writes.

    Raises:
        UserError: the run, the list of slides or the place to write to cannot be used, or some slides could not be
            predicted, which are named; the others are written by then.
    """
    predict_with(start_predictor(request.run, request), request)


def predict_with(predictor: Predictor, request: PredictRequest) -> None:
    """Predict slides like `predict_slides`, with a run that is loaded already; every rank calls it.

    Raises:
        UserError: as there.
    """
    run, data, world = predictor.run, predictor.run.config.data, predictor.mesh.world
    kind, labels = supervision_of(data.supervision), None
    if request.manifest is None:
        files = name_files(request.slides)
    else:
        files = read_files(request.manifest, data)
        labels = read_labels(request.manifest, data, run.classes)
    log.info("%d slides, by epoch %d of %s, %s", len(files), run.epoch, run.folder, request.precision)
    if isinstance(labels, str):
        log.warning("predictions without metrics: %s", labels)
    elif labels is not None and labels.without:
        log.warning("metrics without the slides that are not labelled: %s", labels.without)
    seen = labels.seen if isinstance(labels, Labels) else 0
    if own := world.ask_main(lambda: known_splits(run.folder, files)):
        log.warning(
            "of these slides, %s of this run itself: its predictions for them are no evidence for other slides",
            " and ".join(f"{count} are in split {split}" for split, count in sorted(own.items())),
        )
        seen = max(seen, own["train"] + own["val"])
    elif seen:
        log.warning("%d slides are in split train or val of %s: their metrics are optimistic", seen, request.manifest)
    header = ("slide_id", "path", *kind.output_columns(run.classes), "k")
    rows: dict[str, tuple[object, ...]] = {}
    outputs: dict[str, np.ndarray] = {}
    failures: list[Failure] = []

    def write_table() -> None:
        write_csv(request.out, header, [rows[file.slide_id] for file in files if file.slide_id in rows])

    _write(request.out, partial(_check_places, request, files), world)
    _write(request.out, write_table, world)  # now, so that nothing is computed for a table that cannot be written
    stopping.note(f"before the first of {len(files)} slides", "give the same command again")
    for number, answer in enumerate(predictor.predict(files), start=1):
        stopping.note(f"after {number} of {len(files)} slides", f"{request.out} has those that were predicted")
        if isinstance(answer, Failure):
            failures.append(answer)
            log.warning("%s: %s", answer.file.slide_id, answer.reason)
            continue
        name = answer.file.slide_id
        shown = kind.output_cells(run.classes, answer.output)
        rows[name], outputs[name] = (name, answer.file.path, *shown, len(answer.tiling.coords)), answer.output
        log.info("%s: %s (%d tiles)", name, ", ".join(shown), len(answer.tiling.coords))
        _write(request.out, write_table, world)  # after each slide, so that nothing that follows can lose it
        if request.heatmaps is not None and world.rank == 0:
            try:
                with predictor.open(answer.file) as slide:
                    write_attention(
                        request.heatmaps,
                        name,
                        slide,
                        answer.tiling,
                        attention_of(answer, predictor.run),
                        model=run.title,
                        says=predictor.says(answer),
                    )
            except (SlideError, OSError) as error:  # it is predicted all the same; only its picture is missing
                failures.append(Failure(answer.file, f"no heatmap: {error}"))
                log.warning("%s: no heatmap: %s", name, error)
    log.info("%d predictions in %s", len(outputs), request.out)
    judgeable = [name for name in outputs if isinstance(labels, Labels) and name in labels.targets]
    if isinstance(labels, Labels) and judgeable:
        judged = Judged(
            data.supervision,
            np.array([labels.targets[name] for name in judgeable]),
            np.stack([outputs[name] for name in judgeable]),
            [labels.cases[name] for name in judgeable],
            run.classes,
        )
        _write(request.out, partial(_write_metrics, request.out, judged, seen), world)
    failures = world.gather_objects(failures)[0]
    if failures:
        reasons = "\n".join(f"  {file.slide_id}: {reason}" for file, reason in failures)
        raise UserError(f"{len(failures)} of {len(files)} slides failed:\n{reasons}")


def _write(path: Path, write: Callable[[], None], world: RankGroup) -> None:
    """Let the main rank write; if it cannot, every rank raises.

    Raises:
        UserError: it cannot.
    """

    def attempt() -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from None

    world.ask_main(attempt)


def _metrics_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}_metrics.json")


def _check_places(request: PredictRequest, files: Sequence[NamedFile]) -> None:
    """Refuse to write over inputs, and over files that this command has not written.

    Raises:
        OSError: says what is there.
    """
    inputs = [file.path for file in files] + [request.run / name for name in ("config.json", WEIGHTS)]
    inputs += [path for path in (request.manifest, request.weights) if path is not None]
    check_output(request.out, inputs, begins=b"slide_id,path,")
    check_output(_metrics_of(request.out), inputs, begins=b'{\n  "split": "external"')
    if request.heatmaps is not None:
        request.heatmaps.mkdir(parents=True, exist_ok=True)


def _write_metrics(out: Path, judged: Judged, seen: int) -> None:
    """Write metrics and figures beside the table."""
    path, folder = _metrics_of(out), out.with_name(f"{out.stem}_figures")
    found = estimate(*judged)
    write_metrics(path, found, "external", seen=seen)
    draw_figures(folder, judged, "predicted", found)
    of = "" if found.positive_class is None else f" of {found.positive_class}"
    patients = len(set(judged.cases))
    log.info("%s%s, of %d slides of %d patients; more in %s and %s", found, of, found.count, patients, path, folder)


def name_files(paths: Sequence[Path]) -> list[NamedFile]:
    """Name slides after their files, without the ending.

    Raises:
        ConfigError: two have one name.
    """
    counts = Counter(path.stem for path in paths)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(
            f"--slides: several files are called {', '.join(repeated)}; give them names in a --manifest with the "
            "columns slide_id and path"
        )
    return [NamedFile(path.stem, path) for path in paths]


def _try_tiling(file: NamedFile, spec: TileSpec) -> Tiling | str:
    try:
        with open_slide(file.path, default_mpp_um=spec.default_mpp_um, mpp_um=file.mpp_um) as slide:
            return tile_slide(slide, spec)
    except SlideError as error:
        return str(error)
