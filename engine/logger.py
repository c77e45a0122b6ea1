"""What a run tells: a progress bar and a line an epoch on the terminal, curves and pictures in TensorBoard."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# Of a meter that has no terminal to draw a bar on.
LINE_EVERY_S = 60.0


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
            desc=what,
            total=total,
            unit=unit,
            smoothing=0,
            dynamic_ncols=True,
            leave=False,
            disable=not main or self._lines or not bar,
        )

    def reach(self, done: int, note: str = "") -> None:
        """Tell that so many of them are done, where it is time to; `note` is added to the line."""
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._lines and now - self._told >= LINE_EVERY_S:
            self._told = now
            spent = now - self._begin
            left = f", {_duration(spent * (self._total - done) / done)} left" if done else ""
            log.info(
                "%s: %s of %s %ss (%.0f%%), %s%s%s",
                self._what,
                f"{done:,}",
                f"{self._total:,}",
                self._unit,
                100 * done / max(self._total, 1),
                _speed(done / spent, self._unit),
                left,
                f", {note}" if note else "",
            )

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
