"""What a run tells: a progress bar and a line an epoch on the terminal, curves and pictures in TensorBoard."""

import logging
import sys
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


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
    """

    def __init__(self, folder: Path, *, main: bool, slides: int, done: int, step: int) -> None:
        self._board = SummaryWriter(folder, purge_step=step + 1) if main else None
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

    def flush(self) -> None:
        """Let a viewer see all that was written."""
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """End the bar and the event files."""
        self.bar.close()
        if self._board:
            self._board.close()
