"""Training: epochs of steps, each followed by validation on whole slides."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from slidescale.engine.config import Config
from slidescale.engine.data.bag import epoch_size
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.prefetch import TileReader
from slidescale.engine.data.records import Split
from slidescale.engine.errors import TrainingError
from slidescale.engine.evaluation.intervals import describe, estimate
from slidescale.engine.evaluation.predictions import Evaluation, evaluate
from slidescale.engine.evaluation.results import draw_figures, draw_heatmaps, write_metrics, write_predictions
from slidescale.engine.files import save_png
from slidescale.engine.logger import Meter
from slidescale.engine.memory.usage import peak_gib
from slidescale.engine.process.stopping import AGAIN, RESUME, note
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.training.checkpoint import Checkpoints, Progress
from slidescale.engine.training.feed import Feed
from slidescale.engine.training.history import EpochTotals, add_epoch
from slidescale.engine.training.run_log import RunLog
from slidescale.engine.training.step import StepResult, TrainStep

log = logging.getLogger(__name__)

_NORM_NAMES = {
    "total": "train/gradient_norm",
    "aggregator": "train/gradient_norm_aggregator",
    "encoder": "train/gradient_norm_encoder",
}


def best_names(headline: str) -> tuple[str, str]:
    """Names of the scalars that runs are compared by: headline metric and loss of the best epoch."""
    return f"best/val_{headline}", "best/val_loss"


class Trainer:
    """Trains a slide model on a cohort.

    Args:
        folder: of the run, where results are written.
        planned_peak_gib: memory that a rank was planned to take.
    """

    def __init__(
        self,
        config: Config,
        cohort: Cohort,
        feed: Feed,
        train_step: TrainStep,
        objective: Objective,
        reader: TileReader,
        checkpoints: Checkpoints,
        run_log: RunLog,
        folder: Path,
        planned_peak_gib: float,
    ) -> None:
        self.config = config
        self.cohort = cohort
        self.feed = feed
        self.train_step = train_step
        self.objective = objective
        self.strategy = train_step.strategy
        self.mesh = train_step.mesh
        self.reader = reader
        self.checkpoints = checkpoints
        self.run_log = run_log
        self.folder = folder
        self.planned_peak_gib = planned_peak_gib
        self._last_slides: tuple[str, ...] = ()  # of the last step

    def fit(self, progress: Progress) -> None:
        """Train from `progress` to the last epoch; then test the best epoch, if there is a test split."""
        if progress.unreported is not None:
            log.info("epoch %d was trained and not yet validated when the run was cut off", progress.epoch)
            note(f"in epoch {progress.epoch}", RESUME)
            self.run_log.scalars(progress.unreported.last_scalars, progress.step)
            progress = self._validate(progress, progress.unreported)
        for epoch in range(progress.epoch, self.config.run.epochs):
            note(f"in epoch {epoch + 1}", RESUME if progress.epoch else AGAIN)
            self.cohort.try_again()
            totals = self._train_epoch(epoch, progress.step)
            progress = replace(
                progress,
                epoch=epoch + 1,
                step=progress.step + len(totals.losses),
                excluded=self.cohort.lasting,
                unreported=totals,
            )
            self.run_log.flush()  # a resume does not log the steps again that the checkpoint has
            try:
                self.checkpoints.save(self.strategy, progress)  # first, so that nothing that follows can lose the epoch
            except TrainingError as error:
                slides = ", ".join(self._last_slides)
                raise TrainingError(f"after step {progress.step}, on slide {slides}: {error}") from None
            note(f"in epoch {epoch + 1}", RESUME)
            progress = self._validate(progress, totals)
        self.cohort.try_again()
        if self.cohort.usable("test"):
            note("in the test of the best epoch", RESUME)
            self.checkpoints.load(self.strategy, "best")
            result = self.evaluate("test", "testing")
            log.info("test, best epoch: %s", result)
            if self.mesh.world.rank == 0:
                self._write_results(result, "_test", progress.step)

    def _validate(self, progress: Progress, totals: EpochTotals) -> Progress:
        """Validate the epoch of the last checkpoint, mark it if it is the best, and report it.

        Where this is cut off, a resume does it again; an epoch that has been marked then stays the best.
        """
        result = self.evaluate("val", f"validating epoch {progress.epoch}")
        if improved := result.score >= progress.best_score or self.checkpoints.last_is_best():
            progress = replace(progress, best_score=result.score)
            self.checkpoints.mark_best(self.strategy, progress)
        self._report(progress.epoch - 1, progress.step, totals, result, improved=improved)
        return self.checkpoints.mark_reported(progress)

    def evaluate(self, split: Split, what: str) -> Evaluation:
        """Predict the slides of a split from all their tissue tiles."""
        step, rows = self.train_step, self.cohort.usable(split)
        return evaluate(
            self.strategy.model,
            rows,
            self.cohort,
            self.reader,
            self.objective,
            self.mesh,
            step.plan.chunk,
            self.strategy.device,
            what,
        )

    def _train_epoch(self, epoch: int, step: int) -> EpochTotals:
        """Steps over all training slides."""
        self.strategy.model.train()
        totals = EpochTotals(losses=[])
        slides = epoch_size(len(self.cohort.usable("train")), self.config.data.epoch_share)
        name = f"epoch {epoch + 1}/{self.config.run.epochs}"
        # On a terminal the run's own bar shows it.
        meter = Meter(name, slides, "slide", main=self.mesh.world.rank == 0, bar=False)
        begin = time.perf_counter()
        for batch in self.feed.epoch(epoch):
            settings = self.strategy.settings()
            result = self.train_step(batch)
            end = time.perf_counter()
            totals.losses.append(result.loss)
            totals.slides += len(batch.names)
            totals.tiles += batch.k
            totals.seconds += end - begin
            totals.waiting += batch.waited_s
            totals.last_scalars = {
                "train/loss": result.loss,
                **{f"train/{name}": value for name, value in settings.items()},
                **{_NORM_NAMES[what]: norm for what, norm in result.gradient_norms.items()},
                **_attention(result),
                "speed/tiles_per_s": batch.k / (end - begin),
                "speed/data_wait_share": batch.waited_s / (end - begin),
                **{f"seconds/{phase.replace(' ', '_')}": spent for phase, spent in result.seconds.items()},
            }
            self.run_log.scalars(totals.last_scalars, step + len(totals.losses))
            self._last_slides = batch.names
            meter.reach(totals.slides, f"loss {np.mean(totals.losses):.3f}")
            self.run_log.bar.set_description(name, refresh=False)
            speed = totals.tiles / totals.seconds
            self.run_log.bar.set_postfix(loss=f"{np.mean(totals.losses):.3f}", tiles_per_s=f"{speed:.0f}")
            self.run_log.bar.update(len(batch.names))
            begin = time.perf_counter()
        return totals

    def _report(self, epoch: int, step: int, totals: EpochTotals, result: Evaluation, *, improved: bool) -> None:
        """Report an epoch: a line, scalars, and, when it is the best so far, predictions and pictures."""
        train_loss = float(np.mean(totals.losses)) if totals.losses else math.nan
        seconds = max(totals.seconds, 1e-9)
        peak = max(self.mesh.world.gather_objects(peak_gib(self.strategy.device)))
        self.run_log.scalars({"epoch/train_loss": train_loss, "speed/peak_gib": peak}, step)
        self.run_log.scalars({"speed/planned_peak_gib": self.planned_peak_gib}, step)
        if result.loss is not None:
            self.run_log.scalars({"epoch/val_loss": result.loss}, step)
            metrics = {name: value for name, value in result.metrics.items() if value is not None}
            self.run_log.scalars({f"val/{name}": value for name, value in metrics.items()}, step)
            if result.headline in metrics:
                self.run_log.scalars({f"epoch/val_{result.headline}": metrics[result.headline]}, step)
            if improved:
                best = zip(best_names(result.headline), (metrics.get(result.headline), result.loss), strict=True)
                self.run_log.scalars({name: value for name, value in best if value is not None}, step)
        log.info(
            "epoch %2d/%d  train loss %.3f  val %s%s  %5.0f tiles/s  waited %2.0f%%  peak %.1f GiB (planned %.1f)",
            epoch + 1,
            self.config.run.epochs,
            train_loss,
            result,
            " best" if improved else "     ",
            totals.tiles / seconds,
            100 * totals.waiting / seconds,
            peak,
            self.planned_peak_gib,
        )
        if self.mesh.world.rank == 0:
            values = {
                "step": step,
                "train_loss": train_loss,
                "val_loss": result.loss,
                **{f"val_{name}": value for name, value in result.metrics.items() if "/" not in name},
                "tiles_a_slide": totals.tiles / max(totals.slides, 1),
                "tiles_per_s": totals.tiles / seconds,
                "seconds": totals.seconds,
                "peak_gib": peak,
            }
            add_epoch(self.folder, epoch + 1, values)
        if improved and self.mesh.world.rank == 0:
            self._write_results(result, "", step)
            pictures = draw_heatmaps(result, self.cohort, self.config.data, count=self.config.run.heatmaps)
            for name, picture in pictures.items():
                path = self.folder / "heatmaps" / f"{name}.png"
                with _unless_unwritable(path):
                    save_png(picture, path)
                self.run_log.image(f"attention/{name}", picture, step)
        self.run_log.flush()

    def _write_results(self, result: Evaluation, suffix: Literal["", "_test"], step: int) -> None:
        """Predictions, metrics and figures of a split, by the main rank; intervals take too long for every epoch."""
        with _unless_unwritable(path := self.folder / f"predictions{suffix}.csv"):
            write_predictions(path, result)
        if not result.predictions:
            return
        judged = result.judged
        found, split = estimate(*judged), "test" if suffix else "val"
        if suffix:
            log.info("%s", describe(found))
        with _unless_unwritable(path := self.folder / f"metrics{suffix}.json"):
            write_metrics(path, found, "test" if suffix else "val")
        with _unless_unwritable(folder := self.folder / f"figures{suffix}"):
            for name, picture in draw_figures(folder, judged, f"split {split}", found).items():
                self.run_log.image(f"figures{suffix}/{name}", picture, step)


@contextmanager
def _unless_unwritable(path: Path) -> Iterator[None]:
    """Go on with the run where a result cannot be written: a checkpoint, which is by then, has what it is made of."""
    try:
        yield
    except OSError as error:
        log.warning("cannot write %s, and the run goes on without: %s", path, error)


def _attention(result: StepResult) -> dict[str, float]:
    """The scalars of the attention, where the aggregator has one."""
    if math.isnan(result.attention_entropy):
        return {}
    return {"train/attention_entropy": result.attention_entropy, "train/effective_tiles": result.effective_tiles}
