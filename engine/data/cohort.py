"""The cohort in use: the manifest's slides with their tilings, less those that proved unusable."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slidescale.engine.data.manifest import Manifest, ManifestRow, Split
from slidescale.engine.data.tiling import TileSpec, Tiling, cached_tiling
from slidescale.engine.errors import SlideError, UserError
from slidescale.engine.files import write_csv
from slidescale.engine.parallel.rank_group import RankGroup

log = logging.getLogger(__name__)


class Cohort:
    """Which slides can be used, the same on every rank.

    Args:
        max_excluded: largest share of the manifest's slides that may be set aside.
        excluded_csv: where those are listed, with the reason.
    """

    def __init__(self, manifest: Manifest, world: RankGroup, *, max_excluded: float, excluded_csv: Path) -> None:
        self.manifest = manifest
        self.tilings: dict[str, Tiling] = {}
        self.excluded: dict[str, str] = {}
        self._world = world
        self._max_excluded = max_excluded
        self._excluded_csv = excluded_csv

    def tile(self, spec: TileSpec, cache: Path, *, threads: int) -> None:
        """Find every slide's tissue, each rank its share of the slides.

        Raises:
            UserError: too many slides are unusable, or a split has none left.
        """
        log.info("finding the tissue of %d slides (kept in %s)", len(self.manifest.rows), cache)
        mine = self.manifest.rows[self._world.rank :: self._world.size]
        with ThreadPoolExecutor(threads) as pool:
            found = dict(pool.map(lambda row: (row.slide_id, _try_tiling(row, spec, cache)), mine))
        results = {slide_id: result for part in self._world.gather_objects(found) for slide_id, result in part.items()}
        for row in self.manifest.rows:
            match results[row.slide_id]:
                case Tiling() as tiling:
                    self.tilings[row.slide_id] = tiling
                    for doubt in tiling.doubts:
                        log.warning("%s", doubt)
                case str() as reason:
                    self.exclude(row.slide_id, reason)
        self.check_splits()

    def check_splits(self) -> None:
        """Refuse a split that has lost all its slides.

        Raises:
            UserError: with the reasons.
        """
        for split in ("train", "val", "test"):
            if self.manifest.split(split) and not self.usable(split):
                raise UserError(f"no {split} slide is usable:\n{self._reasons()}")

    def usable(self, split: Split) -> list[ManifestRow]:
        """The slides of a split that can be read."""
        return [row for row in self.manifest.split(split) if row.slide_id not in self.excluded]

    def exclude_faults(self, mine: tuple[str, str] | None) -> None:
        """Tell the other ranks of a slide that could not be read, hear of theirs, and set all these aside.

        Args:
            mine: (slide_id, reason), or None.
        """
        for fault in self._world.gather_objects(mine):
            if fault is not None and fault[0] not in self.excluded:
                self.exclude(*fault)

    def exclude(self, slide_id: str, reason: str) -> None:
        """Set a slide aside; every rank calls this alike.

        Raises:
            UserError: that is one too many.
        """
        log.warning("set aside %s: %s", slide_id, reason)
        self.excluded[slide_id] = reason
        if self._world.rank == 0:
            paths = {row.slide_id: row.path for row in self.manifest.rows}
            rows = [(name, paths[name], why) for name, why in self.excluded.items()]
            write_csv(self._excluded_csv, ("slide_id", "path", "reason"), rows)
        total = len(self.manifest.rows)
        if len(self.excluded) > self._max_excluded * total:
            raise UserError(
                f"{len(self.excluded)} of {total} slides are unusable, more than the share --data.max-excluded "
                f"{self._max_excluded:g} allows:\n{self._reasons()}"
            )

    def _reasons(self) -> str:
        return "\n".join(f"  {slide_id}: {reason}" for slide_id, reason in self.excluded.items())


def _try_tiling(row: ManifestRow, spec: TileSpec, cache: Path) -> Tiling | str:
    """The tiling, or why there is none."""
    try:
        return cached_tiling(row.path, spec, cache, mpp_um=row.mpp_um)
    except SlideError as error:
        return str(error)
