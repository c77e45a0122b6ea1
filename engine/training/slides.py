"""The slides of a run: of which every one's tissue has been found, and what the log says of them."""

import logging
from pathlib import Path
from typing import Literal

from slidescale.engine.config import Config
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.manifest import Manifest
from slidescale.engine.data.prefetch import TileReader
from slidescale.engine.data.tiling import TileSpec
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.supervision.make import supervision_of

log = logging.getLogger(__name__)


def open_cohort(config: Config, manifest: Manifest, folder: Path, mesh: Mesh) -> tuple[Cohort, TileReader]:
    """Find the tissue of every slide; return the cohort, and what reads its tiles.

    Args:
        folder: of the run, where excluded.csv is written.

    Raises:
        UserError: too many slides cannot be used.
    """
    data = config.data
    spec = TileSpec(
        tile_px=data.tile_px, mpp_um=data.mpp_um, min_tissue=data.min_tissue, default_mpp_um=data.default_mpp_um
    )
    cohort = Cohort(manifest, mesh.world, max_excluded=data.max_excluded, excluded_csv=folder / "excluded.csv")
    cohort.tile(spec, config.run.out / "tilings", threads=data.readers)
    _describe(cohort)
    if config.model.slide_norm:
        _warn_of_single_tiles(cohort, data.k)
    return cohort, TileReader(spec, threads=data.readers, pin=mesh.device.type == "cuda")


def _describe(cohort: Cohort) -> None:
    manifest = cohort.manifest
    if words := supervision_of(manifest.supervision).describe(manifest.classes):
        log.info("%s", words)
    if not cohort.usable("val"):
        log.warning("no slide is in split 'val': no epoch can be chosen as the best, and the last one is kept")
    for split in ("train", "val", "test"):
        if rows := cohort.usable(split):
            tiles = sorted(len(cohort.tilings[row.slide_id].coords) for row in rows)
            log.info(
                "%-5s %d slides, %s tissue tiles per slide (median %d)",
                split,
                len(rows),
                f"{tiles[0]} to {tiles[-1]}",
                tiles[len(tiles) // 2],
            )


def _warn_of_single_tiles(cohort: Cohort, k: int | Literal["all"]) -> None:
    """Normalised over its tiles, a slide of one has no features: all such slides get one and the same prediction."""
    rows = [row for split in ("train", "val", "test") for row in cohort.usable(split)]
    tiles = {row.slide_id: len(cohort.tilings[row.slide_id].coords) for row in rows}
    single = [row.slide_id for row in rows if tiles[row.slide_id] == 1 or (k == 1 and row.split == "train")]
    if single:
        log.warning(
            "%d of %d slides have one tile (%s%s), which --model.slide-norm makes zeros: they are all predicted alike",
            len(single),
            len(rows),
            ", ".join(single[:3]),
            " …" if len(single) > 3 else "",
        )
