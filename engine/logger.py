"""What a run tells: a progress bar and a line an epoch on the terminal, curves and pictures in TensorBoard."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from slidescale.engine.metrics import SHOWN
from slidescale.engine.stopwatch import PHASES

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# Of a meter that has no terminal to draw a bar on.
LINE_EVERY_S = 60.0

# Of the HPARAMS tab, whose table is for comparing runs: what every run has there, and how many more it may have.
CORE_SETTINGS = (
    "model.encoder", "model.pretrained", "model.frozen", "data.k", "data.tile_px", "data.mpp_um", "optim.lr",
    "optim.encoder_lr_scale", "run.epochs", "run.seed",
)  # fmt: skip
MOST_SETTINGS = 15
# Names and places, which TensorBoard shows anyhow, and what changes a run's speed alone.
NOT_COMPARED: tuple[str, ...] = (
    "run.name",
    "run.out",
    "run.heatmaps",
    "run.kernels",
    "data.manifest",
    "data.readers",
    "data.prefetch",
)
NOT_COMPARED += ("deepspeed_config", "local_rank", "resume", "memory.", "parallel.", "data.classes", "model.weights")
NOT_COMPARED += tuple(f"data.{name}_column" for name in ("slide", "case", "path", "label", "event", "split"))


def layout(headline: str) -> dict[str, dict[str, list[object]]]:
    """What TensorBoard's CUSTOM SCALARS tab shows, in its order: charts by category and title.

    Each chart has one curve a run. TensorBoard colours curves by their run, so that two of one run look alike.

    Args:
        headline: the metric that tells the best epoch, as `metrics.HEADLINES` names it.
    """
    charts = {
        "validation": {
            f"{SHOWN.get(headline, headline)}, validation": f"val/{headline}",
            "loss, validation": "epoch/val_loss",
        },
        "training": {
            "loss, training": "train/loss",
            "loss, training, mean of each epoch": "epoch/train_loss",
            "learning rate of the aggregator": "train/learning_rate",
            "learning rate of the encoder": "train/learning_rate_encoder",
            "weight decay": "train/weight_decay",
            "gradient norm, before clipping": "train/gradient_norm",
            "gradient norm of the aggregator": "train/gradient_norm_aggregator",
            "gradient norm of the encoder": "train/gradient_norm_encoder",
            "attention entropy (1: all tiles alike, 0: one tile)": "train/attention_entropy",
        },
        "speed": {
            "tiles per second": "speed/tiles_per_s",
            "share of a step spent waiting for tiles": "speed/data_wait_share",
            **{f"seconds per step: {phase}": f"seconds/{phase.replace(' ', '_')}" for phase in PHASES},
        },
    }
    return {
        category: {title: ["Multiline", [f"^{tag}$"]] for title, tag in titles.items()}
        for category, titles in charts.items()
    }


def compared_settings(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings in the HPARAMS tab: a handful that every run has, then what differs from its default.

    Args:
        settings: by dotted name.
        defaults: of the same.

    Returns:
        At most `MOST_SETTINGS` of them.
    """
    changed = [name for name, value in settings.items() if value != defaults[name]]
    names = [name for name in CORE_SETTINGS if name in settings]
    names += [name for name in changed if name not in names and not name.startswith(NOT_COMPARED)]
    return {name: settings[name] for name in names[:MOST_SETTINGS]}


def configure_logging(main: bool) -> None:
    """Let the main rank speak, above its progress bar, and the others only of errors."""
    handler = _AboveTheBar()
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("slidescale")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if main else logging.ERROR)


class _AboveTheBar(logging.Handler):
    """Writes to stderr without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
    """The bare message; its level only where it matters."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


class RunLog:
    """The writers of a run; silent on all ranks but the main one.

    Args:
        folder: where TensorBoard's event files go.
        slides: that the whole run trains on, for the progress bar.
        done: of these, trained on before a resume.
        step: optimizer steps taken before a resume.
        again: of these, the last one's scalars, and those of the epoch that ended with it, will be logged again.
            What the run that was cut off has logged of them is dropped, and so are all later steps.
    """

    def __init__(self, folder: Path, *, main: bool, slides: int, done: int, step: int, again: bool = False) -> None:
        self._board = SummaryWriter(folder, purge_step=step + (not again)) if main else None
        self._begins = step == 0
        # A bar that is not on a terminal would fill a log file with its redrawings; epochs' lines tell enough there.
        self.bar = tqdm(
            total=slides, initial=done, unit="slide", smoothing=0,
            dynamic_ncols=True, leave=False, disable=not main or not sys.stderr.isatty(),
        )  # fmt: skip

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write named values."""
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Write a uint8 `[H, W, 3]` picture."""
        if self._board:
            self._board.add_image(name, image, step, dataformats="HWC")

    def hyperparameters(
        self, settings: dict[str, Any], defaults: dict[str, Any], metrics: Sequence[str], headline: str
    ) -> None:
        """Tell a run's settings: a page in the TEXT tab, and a row in the HPARAMS tab, which compares runs.

        Only where the run begins: what resumes it has the same settings, and they have been told.

        Args:
            settings: by dotted name.
            defaults: of the same.
            metrics: names of scalars, whose latest values are that row's results; they may still be to come.
            headline: the metric that tells the best epoch.
        """
        if self._board is None or not self._begins:
            return
        changed = {name: value for name, value in settings.items() if value != defaults[name]}
        page = f"## Changed\n\n{_table(changed, defaults)}\n\n## All\n\n{_table(settings, defaults)}"
        self._board.add_text("settings", page, 0)
        self._board.add_custom_scalars(layout(headline))
        compared = compared_settings(settings, defaults)
        values = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in compared.items()}
        # Not SummaryWriter.add_hparams, which makes a second run of it in a folder of its own, and wants results now.
        experiment, start, _ = hparams(values, dict.fromkeys(metrics, 0.0))
        for summary in (experiment, start):
            self._board._get_file_writer().add_summary(summary)

    def finished(self) -> None:
        """Tell the HPARAMS tab that the run has come to its end."""
        if self._board:
            _, _, end = hparams({}, {})
            self._board._get_file_writer().add_summary(end)

    def flush(self) -> None:
        """Let a viewer see all that was written."""
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """End the bar and the event files."""
        self.bar.close()
        if self._board:
            self._board.close()


class Meter:
    """How far something long has come: a bar on a terminal, elsewhere a line a minute; silent but on the main rank.

    Args:
        what: is being done, "encoding".
        total: of what is counted.
        unit: one of these, "tile".
        bar: whether there is a bar of its own on a terminal.
    """

    def __init__(self, what: str, total: int, unit: str, *, main: bool, bar: bool = True) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._lines = main and not sys.stderr.isatty()
        self._begin = self._told = time.monotonic()
        self._bar = tqdm(
            desc=what, total=total, unit=unit, smoothing=0,
            dynamic_ncols=True, leave=False, disable=not main or self._lines or not bar,
        )  # fmt: skip

    def reach(self, done: int, note: str = "") -> None:
        """Tell that so many of them are done, where it is time to; `note` is added to the line."""
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._lines and now - self._told >= LINE_EVERY_S:
            self._told = now
            spent = now - self._begin
            left = f", {_duration(spent * (self._total - done) / done)} left" if done else ""
            log.info(
                "%s: %s of %s %ss (%.0f%%), %s%s%s", self._what, f"{done:,}", f"{self._total:,}", self._unit,
                100 * done / max(self._total, 1), _speed(done / spent, self._unit), left, f", {note}" if note else "",
            )  # fmt: skip

    def count(self, items: Iterable[Item], ranks: int) -> Iterator[Item]:
        """Hand `items` on, count each `ranks` times, for this rank and the others, and take the bar away at the end."""
        try:
            for done, item in enumerate(items, start=1):
                self.reach(min(done * ranks, self._total))
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def _speed(per_second: float, unit: str) -> str:
    """In whichever unit of time gives at least one: "1,200 tiles/s", "3.5 slides/min"."""
    for seconds, name in ((1, "s"), (60, "min"), (3600, "h")):
        if (amount := per_second * seconds) >= 1 or name == "h":
            break
    return f"{amount:,.0f} {unit}s/{name}" if amount >= 10 else f"{amount:.1f} {unit}s/{name}"


def _duration(seconds: float) -> str:
    """In words: "40 s", "12 min", "3 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _table(settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Markdown, a row a setting."""
    rows = [f"| {name} | {_cell(value)} | {_cell(defaults[name])} |" for name, value in settings.items()]
    return "\n".join(["| setting | value | default |", "| --- | --- | --- |", *rows])


def _cell(value: Any) -> str:
    """A value in a cell, whose borders would end it."""
    return str(value).replace("|", "\\|").replace("\n", " ")
