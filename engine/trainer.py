"""Training: epochs of steps, each followed by validation on whole slides."""

import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from slidescale.engine.checkpoint import Checkpoints, Progress
from slidescale.engine.config import Config
from slidescale.engine.data.bag import Bag, draw_bag, epoch_order
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.manifest import ManifestRow, Split
from slidescale.engine.data.prefetch import Reading, TileReader, TileRequest
from slidescale.engine.errors import SlideError, TrainingError
from slidescale.engine.evaluation import Evaluation, evaluate
from slidescale.engine.logger import RunLog
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode, seeded
from slidescale.engine.memory.usage import peak_gib
from slidescale.engine.objective import CrossEntropy
from slidescale.engine.parallel.strategy import Strategy
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.report import draw_heatmaps, save_png, write_predictions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Of one training step: the slide's loss, and the gradient norm before clipping."""

    loss: float
    gradient_norm: float


@dataclass
class EpochTotals:
    """Sums over an epoch's steps."""

    losses: list[float]
    tiles: int = 0
    seconds: float = 0.0
    waiting: float = 0.0


class Trainer:
    """Trains a slide model on a cohort.

    Args:
        folder: of the run, where results are written.
    """

    def __init__(
        self,
        config: Config,
        cohort: Cohort,
        strategy: Strategy,
        objective: CrossEntropy,
        reader: TileReader,
        checkpoints: Checkpoints,
        run_log: RunLog,
        group: TileGroup,
        folder: Path,
    ) -> None:
        self.config = config
        self.cohort = cohort
        self.strategy = strategy
        self.objective = objective
        self.reader = reader
        self.checkpoints = checkpoints
        self.run_log = run_log
        self.group = group
        self.folder = folder

    def fit(self, progress: Progress) -> None:
        """Train from `progress` to the last epoch; then test the best epoch, if there is a test split."""
        step, best_score = progress.step, progress.best_score
        for epoch in range(progress.epoch, self.config.run.epochs):
            totals = self._train_epoch(epoch, step)
            step += len(totals.losses)
            progress = Progress(epoch=epoch + 1, step=step, best_score=best_score, excluded=self.cohort.excluded)
            self.checkpoints.save(self.strategy, progress)  # first, so that nothing that follows can lose the epoch
            result = self.evaluate("val")
            if improved := result.score >= best_score:
                best_score = result.score
                self.checkpoints.mark_best(replace(progress, best_score=best_score))
            self._report(epoch, step, totals, result, improved=improved)
        if self.cohort.usable("test"):
            self.checkpoints.load(self.strategy, "best")
            result = self.evaluate("test")
            log.info("test, best epoch: %s", result)
            if self.group.rank == 0:
                write_predictions(self.folder / "predictions_test.csv", result, self.cohort.manifest.classes)

    def evaluate(self, split: Split) -> Evaluation:
        """Predict the slides of a split from all their tissue tiles."""
        model, chunk = self.strategy.model, self.config.memory.chunk
        rows = self.cohort.usable(split)
        return evaluate(model, rows, self.cohort, self.reader, self.objective, self.group, chunk, self.strategy.device)

    def train_step(self, bag: Bag, tiles: Tensor) -> StepResult:
        """One optimizer step on one slide: exact gradients over all K tiles, in memory for one chunk of them.

        Args:
            tiles: this rank's share of the bag, uint8 `[K_local, H, W, 3]`.

        Raises:
            TrainingError: loss or gradient is not finite; names the slide, and no optimizer step was taken.
        """
        strategy, model, group = self.strategy, self.strategy.model, self.group
        size = self.config.memory.chunk
        offset = group.share(bag.k).start
        chunks = Chunks(
            tiles.to(strategy.device, non_blocking=True), size, group.chunk_count(bag.k, size), bag.seed, offset
        )
        with strategy.accumulate():
            features = encode(model, chunks).requires_grad_()
            with seeded(strategy.device, bag.seed, "aggregate", offset):
                logits, _ = model.aggregate(features, group)
            loss = self.objective(logits, bag.row.label)
            if not math.isfinite(loss.item()):
                raise TrainingError(f"slide {bag.row.slide_id}: the loss is {loss.item()}; no optimizer step was taken")
            strategy.backward(loss)
            backpropagate(model, chunks, features.grad, strategy.backward)
        try:
            gradient_norm = strategy.step()
        except TrainingError as error:
            raise TrainingError(f"slide {bag.row.slide_id}: {error}") from None
        return StepResult(loss.item(), gradient_norm)

    def _train_epoch(self, epoch: int, step: int) -> EpochTotals:
        """A step on every training slide, in an order of the epoch's own."""
        self.strategy.model.train()
        rows = epoch_order(self.cohort.usable("train"), seed=self.config.run.seed, epoch=epoch)
        bags = [self._draw(row, epoch) for row in rows]
        requests = (TileRequest(bag.row.path, bag.coords[self.group.share(bag.k)]) for bag in bags)
        totals = EpochTotals(losses=[])
        begin = time.perf_counter()
        for bag, reading in zip(bags, self.reader.ahead(requests, self.config.data.prefetch), strict=True):
            tiles = self._wait(bag.row, reading)
            ready = time.perf_counter()
            if tiles is None:
                self.run_log.bar.update()
                begin = ready
                continue
            learning_rate = self.strategy.learning_rate()
            result = self.train_step(bag, tiles)
            end = time.perf_counter()
            totals.losses.append(result.loss)
            totals.tiles += bag.k
            totals.seconds += end - begin
            totals.waiting += ready - begin
            self.run_log.scalars(
                {
                    "train/loss": result.loss,
                    "train/learning_rate": learning_rate,
                    "train/gradient_norm": result.gradient_norm,
                    "speed/tiles_per_s": bag.k / (end - begin),
                    "speed/data_wait_share": (ready - begin) / (end - begin),
                },
                step + len(totals.losses),
            )
            self.run_log.bar.set_description(f"epoch {epoch + 1}/{self.config.run.epochs}", refresh=False)
            speed = totals.tiles / totals.seconds
            self.run_log.bar.set_postfix(loss=f"{np.mean(totals.losses):.3f}", tiles_per_s=f"{speed:.0f}")
            self.run_log.bar.update()
            begin = time.perf_counter()
        return totals

    def _draw(self, row: ManifestRow, epoch: int) -> Bag:
        tiling = self.cohort.tilings[row.slide_id]
        return draw_bag(row, tiling, self.config.data.k, seed=self.config.run.seed, epoch=epoch)

    def _wait(self, row: ManifestRow, reading: Reading) -> Tensor | None:
        """The tiles, or None on every rank when any rank could not read its own."""
        try:
            tiles, fault = reading.wait(), None
        except SlideError as error:
            tiles, fault = None, str(error)
        return None if self.cohort.has_fault(row, fault) else tiles

    def _report(self, epoch: int, step: int, totals: EpochTotals, result: Evaluation, *, improved: bool) -> None:
        """Tell of an epoch: a line, scalars, and, when it is the best so far, predictions and pictures."""
        train_loss = float(np.mean(totals.losses)) if totals.losses else math.nan
        seconds = max(totals.seconds, 1e-9)
        peak = max(self.group.gather_objects(peak_gib(self.strategy.device)))
        self.run_log.scalars({"epoch/train_loss": train_loss, "speed/peak_gib": peak}, step)
        if result.loss is not None:
            self.run_log.scalars({"epoch/val_loss": result.loss}, step)
        if result.auroc is not None:
            self.run_log.scalars({"epoch/val_auroc": result.auroc}, step)
        log.info(
            "epoch %2d/%d  train loss %.3f  val %s%s  %5.0f tiles/s  waited %2.0f%%  peak %.1f GiB",
            epoch + 1, self.config.run.epochs, train_loss, result, " best" if improved else "     ",
            totals.tiles / seconds, 100 * totals.waiting / seconds, peak,
        )  # fmt: skip
        if improved and self.group.rank == 0:
            write_predictions(self.folder / "predictions.csv", result, self.cohort.manifest.classes)
            pictures = draw_heatmaps(result, self.cohort, self.config.data, count=self.config.run.heatmaps)
            for name, picture in pictures.items():
                save_png(picture, self.folder / "heatmaps" / f"{name}.png")
                self.run_log.image(f"attention/{name}", picture, step)
        self.run_log.flush()
