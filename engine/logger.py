"""Log lines, and progress: a bar on a terminal, a line per minute elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# How often a meter logs a line where there is no terminal to draw a bar on.
LINE_EVERY_S = 60.0


def configure_logging(main: bool) -> None:
    """Log everything of the main rank, above its progress bar, and only errors of the other ranks."""
    handler = _AboveTheBar()
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("slidescale")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if main else logging.ERROR)


class _AboveTheBar(logging.Handler):
    """A handler that writes to stderr without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
    """A formatter that writes the bare message, with its level only from warnings on."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


class Meter:
    """Progress of something long: a bar on a terminal, a line per minute elsewhere; only on the main rank.

    Args:
        what: what is being done, such as "encoding".
        total: number of units to do.
        unit: what is counted, such as "tile".
        bar: whether to draw a bar on a terminal.
    """

    def __init__(self, what: str, total: int, unit: str, *, main: bool, bar: bool = True) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._lines = main and not sys.stderr.isatty()
        self._begin = self._logged = time.monotonic()
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
        """Show that `done` units are done, if it is time to; `note` is added to the line."""
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if self._lines and now - self._logged >= LINE_EVERY_S:
            self._logged = now
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
        """Yield `items`, count each as `ranks` units because every rank has as many, and remove the bar at the end."""
        try:
            for done, item in enumerate(items, start=1):
                self.reach(min(done * ranks, self._total))
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def _speed(per_second: float, unit: str) -> str:
    """Words for a speed, per the shortest unit of time in which it is at least 1: "1,200 tiles/s", "3.5 slides/min"."""
    for seconds, name in ((1, "s"), (60, "min"), (3600, "h")):
        if (amount := per_second * seconds) >= 1 or name == "h":
            break
    return f"{amount:,.0f} {unit}s/{name}" if amount >= 10 else f"{amount:.1f} {unit}s/{name}"


def _duration(seconds: float) -> str:
    """Words for a time: "40 s", "12 min", "3 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
