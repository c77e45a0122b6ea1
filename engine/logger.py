"""What a run tells: a progress bar and a line an epoch on the terminal, curves and pictures in TensorBoard."""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

log = logging.getLogger(__name__)

# Of a meter that has no terminal to draw a bar on.
LINE_EVERY_S = 60.0

# TensorBoard's CUSTOM SCALARS tab: curves that are read together, by patterns of their names.
LAYOUT = {
    "training": {
        "loss": ["Multiline", ["^train/loss$", "^epoch/.*loss$"]],
        "gradient norms, before clipping": ["Multiline", ["^train/gradient_norm"]],
        "attention entropy (1: all tiles alike, 0: one tile)": ["Multiline", ["^train/attention_entropy$"]],
        "learning rates and weight decay": ["Multiline", ["^train/learning_rate", "^train/weight_decay$"]],
        "tiles a second": ["Multiline", ["^speed/tiles_per_s$"]],
        "seconds a step, by phase": ["Multiline", ["^seconds/"]],
    }
}


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

    def hyperparameters(self, settings: dict[str, Any], defaults: dict[str, Any], metrics: Sequence[str]) -> None:
        """Tell a run's settings: a page in the TEXT tab, and a row in the HPARAMS tab, which compares runs.

        Only where the run begins: what resumes it has the same settings, and they have been told.

        Args:
            settings: by dotted name.
            defaults: of the same.
            metrics: names of scalars, whose latest values are that row's results; they may still be to come.
        """
        if self._board is None or not self._begins:
            return
        changed = {name: value for name, value in settings.items() if value != defaults[name]}
        page = f"## Changed\n\n{_table(changed, defaults)}\n\n## All\n\n{_table(settings, defaults)}"
        self._board.add_text("settings", page, 0)
        self._board.add_custom_scalars(LAYOUT)
        values = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in settings.items()}
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
    """

    def __init__(self, what: str, total: int, unit: str, *, main: bool) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._lines = main and not sys.stderr.isatty()
        self._begin = self._told = time.monotonic()
        self._bar = tqdm(
            desc=what, total=total, unit=unit, smoothing=0,
            dynamic_ncols=True, leave=False, disable=not main or self._lines,
        )  # fmt: skip

    def reach(self, done: int) -> None:
        """Tell that so many of them are done, where it is time to."""
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._lines and now - self._told >= LINE_EVERY_S:
            self._told = now
            log.info(
                "%s: %s of %s %ss (%.0f%%), %.0f a second", self._what, f"{done:,}", f"{self._total:,}", self._unit,
                100 * done / max(self._total, 1), done / (now - self._begin),
            )  # fmt: skip

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def _table(settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Markdown, a row a setting."""
    rows = [f"| {name} | {_cell(value)} | {_cell(defaults[name])} |" for name, value in settings.items()]
    return "\n".join(["| setting | value | default |", "| --- | --- | --- |", *rows])


def _cell(value: Any) -> str:
    """A value in a cell, whose borders would end it."""
    return str(value).replace("|", "\\|").replace("\n", " ")
