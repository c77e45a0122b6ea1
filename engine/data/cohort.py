"""The cohort in use: the manifest's slides with their tilings, without those that proved unusable."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from slidescale.engine.data.manifest import Manifest, ManifestRow
from slidescale.engine.data.records import Split
from slidescale.engine.data.tiling import TileSpec, Tiling, cached_tiling
from slidescale.engine.errors import SlideError, SlideUnavailableError, UserError
from slidescale.engine.files import write_csv
from slidescale.engine.logger import Meter
from slidescale.engine.parallel.rank_group import RankGroup

log = logging.getLogger(__name__)

# Lines of a message that lists slides.
MOST_LINES = 10


class Fault(NamedTuple):
    """A slide that could not be read, and why.

    Attributes:
        passing: it could not be read now, and may be later.
    """

    slide_id: str
    reason: str
    passing: bool = False


def fault_of(slide_id: str, error: SlideError) -> Fault:
    """The fault that the other ranks are to hear of."""
    return Fault(slide_id, str(error), isinstance(error, SlideUnavailableError))


class Cohort:
    """The slides that can be used, the same on every rank.

    Args:
        max_excluded: largest share of the manifest's slides that may be set aside at a time.
        excluded_csv: where those are listed, with the reason.

    Attributes:
        tilings: by slide_id, of each slide whose tissue has been found.
        excluded: why a slide is set aside, by slide_id.
    """

    def __init__(self, manifest: Manifest, world: RankGroup, *, max_excluded: float, excluded_csv: Path) -> None:
        self.manifest = manifest
        self.tilings: dict[str, Tiling] = {}
        self.excluded: dict[str, str] = {}
        self._passing: set[str] = set()  # excluded slides that are tried again in the next epoch,
        self._held: set[str] = set()  # or when the run is resumed
        self._world = world
        self._max_excluded = max_excluded
        self._excluded_csv = excluded_csv
        self._how: tuple[TileSpec, Path, int] | None = None
        self._paths = {row.slide_id: row.path for row in manifest.rows}

    def tile(self, spec: TileSpec, cache: Path, *, threads: int) -> None:
        """Find every slide's tissue, each rank its share of the slides.

        Raises:
            UserError: too many slides are unusable, or a split has none left; the tilings cannot be kept.
        """
        log.info("finding the tissue of %d slides (kept in %s)", len(self.manifest.rows), cache)
        self._how = spec, cache, threads
        self.exclude(*self._tile(self.manifest.rows))
        self.check_splits()

    def _tile(self, rows: Sequence[ManifestRow]) -> list[Fault]:
        """Tile slides, all of them before anything is decided; those that cannot be, in the order of the rows."""
        assert self._how is not None
        spec, cache, threads = self._how
        mine = rows[self._world.rank :: self._world.size]
        found: dict[str, Tiling | Fault] = {}
        trouble = None
        meter = Meter("finding tissue", len(rows), "slide", main=self._world.rank == 0)
        with ThreadPoolExecutor(threads) as pool:
            try:
                found = dict(
                    meter.count(pool.map(partial(_try_tiling, spec=spec, cache=cache), mine), self._world.size)
                )
            except OSError as error:  # the other ranks hear of it below
                pool.shutdown(cancel_futures=True)
                trouble = f"cannot keep tilings in {cache}: {error}"
        everyones = self._world.gather_objects((found, trouble))
        for _, each in everyones:
            if each is not None:
                raise UserError(each)
        results = {slide_id: result for theirs, _ in everyones for slide_id, result in theirs.items()}
        tilings = {row.slide_id: result for row in rows if isinstance(result := results[row.slide_id], Tiling)}
        for tiling in tilings.values():
            for doubt in tiling.doubts:
                log.warning("%s", doubt)
        self.tilings |= tilings
        return [result for row in rows if isinstance(result := results[row.slide_id], Fault)]

    def check_splits(self) -> None:
        """Refuse a split that has lost all its slides.

        Raises:
            UserError: with the reasons.
        """
        for split in ("train", "val", "test"):
            if self.manifest.split(split) and not self.usable(split):
                raise UserError(f"no {split} slide is usable:\n{self._reasons(self.excluded)}")

    def usable(self, split: Split) -> list[ManifestRow]:
        """The slides of a split that are not set aside."""
        return [row for row in self.manifest.split(split) if row.slide_id not in self.excluded]

    def expected(self, split: Split) -> list[ManifestRow]:
        """The slides of a split that later epochs may have: the usable ones, and those that `try_again` looks at."""
        aside = self.excluded.keys() - self._passing
        return [row for row in self.manifest.split(split) if row.slide_id not in aside]

    @property
    def lasting(self) -> dict[str, str]:
        """The part of `excluded` that is set aside for good: without slides that may be readable later."""
        return {name: why for name, why in self.excluded.items() if name not in self._passing | self._held}

    def exclude_faults(self, mine: Fault | None) -> None:
        """Exchange the slides that ranks could not read, and set all of them aside; every rank calls this.

        Args:
            mine: this rank's, if there is one.
        """
        self.exclude(*(fault for fault in self._world.gather_objects(mine) if fault is not None))

    def exclude(self, *faults: Fault) -> None:
        """Set slides aside; every rank calls this alike.

        Raises:
            UserError: that is too many.
        """
        new: dict[str, Fault] = {}
        # Several ranks read a slide: damage seen by one outweighs a passing failure of another.
        for fault in sorted(faults, key=lambda fault: fault.passing):
            worse = fault.slide_id in self._passing and not fault.passing
            if fault.slide_id not in self.excluded or worse:
                new.setdefault(fault.slide_id, fault)
        if not new:
            return
        self.excluded |= {slide_id: fault.reason for slide_id, fault in new.items()}
        self._passing -= new.keys()
        self._passing |= {slide_id for slide_id, fault in new.items() if fault.passing}
        self._write()
        total = len(self.manifest.rows)
        if len(self.excluded) > self._max_excluded * total:
            raise UserError(
                f"{len(self.excluded)} of {total} slides are unusable, more than the share --data.max-excluded "
                f"{self._max_excluded:g} allows:\n{self._reasons(self.excluded)}"
            )
        log.warning(
            "set aside %d slide%s:\n%s%s",
            len(new),
            "s" * (len(new) > 1),
            self._reasons(new),
            "\n  what cannot be read now is tried again later" * any(fault.passing for fault in new.values()),
        )

    def hold(self) -> None:
        """Leave slides that cannot be read now until the run is resumed: no epoch could use them without features."""
        self._held |= self._passing
        self._passing.clear()

    def try_again(self) -> None:
        """Take back the slides that could not be read when it was last tried; every rank calls this alike.

        Raises:
            UserError: the tilings cannot be kept.
        """
        rows = [row for row in self.manifest.rows if row.slide_id in self._passing]
        if not rows:
            return
        for row in rows:
            del self.excluded[row.slide_id]
        self._passing.clear()
        untiled = [row for row in rows if row.slide_id not in self.tilings]
        faults = self._tile(untiled) if untiled else []
        left = len(rows) - len(faults)
        if left:
            log.info(
                "%d slide%s, which could not be read before, %s tried again",
                left,
                "s" * (left > 1),
                "are" if left > 1 else "is",
            )
        if faults:
            self.exclude(*faults)
        else:
            self._write()

    def _write(self) -> None:
        """List the slides that are set aside; the run goes on where that fails, for the log has them too."""
        if self._world.rank != 0:
            return
        rows = [(slide_id, self._paths[slide_id], why) for slide_id, why in self.excluded.items()]
        try:
            write_csv(self._excluded_csv, ("slide_id", "path", "reason"), rows)
        except OSError as error:
            log.warning("cannot write %s, and the run goes on without: %s", self._excluded_csv, error)

    def _reasons(self, slide_ids: Iterable[str]) -> str:
        """One line per slide, or per reason where there are many slides."""
        chosen = list(slide_ids)
        if len(chosen) <= MOST_LINES:
            return "\n".join(f"  {slide_id}: {self.excluded[slide_id]}" for slide_id in chosen)
        by_reason: dict[str, list[str]] = defaultdict(list)
        for slide_id in chosen:
            by_reason[self.excluded[slide_id].replace(str(self._paths[slide_id]), "FILE")].append(slide_id)
        largest = sorted(by_reason.items(), key=lambda item: -len(item[1]))
        lines = [f"  {len(ids)} × {why} ({', '.join(ids[:3])}{', …' * (len(ids) > 3)})" for why, ids in largest]
        more = len(lines) - MOST_LINES
        lines[MOST_LINES:] = [f"  and {more} more reasons"] * (more > 0)
        return "\n".join([*lines, f"  all of them: {self._excluded_csv}"])


def _try_tiling(row: ManifestRow, spec: TileSpec, cache: Path) -> tuple[str, Tiling | Fault]:
    """The slide_id, and the tiling or why there is none."""
    try:
        return row.slide_id, cached_tiling(row.path, spec, cache, mpp_um=row.mpp_um)
    except SlideError as error:
        return row.slide_id, fault_of(row.slide_id, error)
