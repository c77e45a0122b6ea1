"""Tilings: where the tissue of a slide is, as a grid of tiles; computed once per slide and kept."""

import hashlib
import json
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from einops import reduce
from skimage.filters import threshold_otsu

from slidescale.engine.data.retry import fault
from slidescale.engine.data.slide import Slide, open_slide
from slidescale.engine.errors import SlideError
from slidescale.engine.files import file_name, replacing

# Tissue is judged on an image with this many pixels along a tile's side: enough to measure a share of its area.
MASK_PX_PER_TILE = 8
# Saturation that separates tissue from glass. Otsu's threshold adapts it to the stain, within bounds that keep an
# empty slide from turning its noise into tissue, and a slide full of tissue from losing its paler half.
LOWEST_THRESHOLD, HIGHEST_THRESHOLD = 0.05, 0.12
# Saturation, (max - min) / max of the channels, says nothing in the dark, where a grey level or two of noise is a large
# share of them. Stain absorbs some colours more than others, and shade absorbs all alike; so the channels' optical
# densities must differ by this share of the largest. Haematoxylin, eosin, DAB and blood differ by 0.3 to 0.9 of it,
# shadows, black margins and grey ink by less than 0.15, and so do pale pixels only under light too weak for a scan.
LEAST_ABSORPTION_CONTRAST = 0.15
# Luminance (Rec. 601, grey levels) below which nothing is tissue: an optical density of 0.9 in all colours together.
# Dense nuclei of a dark slide have 30 to 40, at this resolution and at one four times as fine; black and dark blue
# ink, and nuclei that shine blue, have less.
DARKEST_TISSUE = 30
# A slide under white light has glass, stroma or at least nuclei that let some of every colour through. With fewer
# pixels than this share that are above this level in all channels, it is dark: fluorescence, or no lamp.
LIGHT_LEVEL, LEAST_LIGHT = 60, 0.005
# To be raised when another tiling or other pixels follow from the same file and settings.
VERSION = 2

# Errors that NumPy and its ZIP reader raise for a file that cannot be read or was changed.
DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class TileSpec:
    """Definition of a tile: `tile_px` pixels square at `mpp_um`, of which a share of `min_tissue` is tissue."""

    tile_px: int
    mpp_um: float
    min_tissue: float
    default_mpp_um: float | None

    def side_px(self, slide: Slide) -> float:
        """A tile's side in a slide's level-0 pixels."""
        return self.tile_px * self.mpp_um / slide.mpp_um


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tissue tiles of one slide, on a grid without overlap, in reading order.

    Attributes:
        coords: int64 `[N, 2]`, (x, y) of each tile's top left corner in level-0 pixels, rounded to whole ones: a tile's
            name. Where it is read is exact (`exact_corners`).
        side_px: a tile's side in level-0 pixels (not an integer in general).
        doubts: sentences for the log on what is odd about the slide.
    """

    coords: np.ndarray
    side_px: float
    doubts: tuple[str, ...] = ()

    @property
    def cells(self) -> np.ndarray:
        """int64 `[N, 2]`, (column, row) of each tile in the slide's grid."""
        return grid_cells(self.coords, self.side_px)


def grid_cells(coords: np.ndarray, side_px: float) -> np.ndarray:
    """int64 `[N, 2]`, (column, row) of tiles with these corners, as `Tiling.coords`."""
    return np.rint(coords / side_px).astype(np.int64)


def exact_corners(coords: np.ndarray, side_px: float) -> np.ndarray:
    """float64 `[N, 2]`, (x, y) in level-0 pixels of the corners that `Tiling.coords` has rounded."""
    return grid_cells(coords, side_px) * side_px


def tile_slide(slide: Slide, spec: TileSpec) -> Tiling:
    """Find the tissue of a slide and lay the grid.

    Raises:
        SlideError: no tissue, too coarse, smaller than a tile, or unreadable.
    """
    slide.check_resolution(spec.mpp_um)
    slide.levels()  # all that is odd about the slide is known from here on
    side_px = spec.side_px(slide)
    columns, rows = int(slide.width / side_px), int(slide.height / side_px)
    if columns == 0 or rows == 0:
        raise SlideError(f"{slide.path}: {slide.width} × {slide.height} px is smaller than one tile ({side_px:.0f} px)")
    tissue = find_tissue(slide, side_px, columns, rows).astype(np.float32)
    share = reduce(tissue, "(r a) (c b) -> r c", "mean", a=MASK_PX_PER_TILE, b=MASK_PX_PER_TILE)
    row, column = np.nonzero(share >= spec.min_tissue)
    if len(row) == 0:
        raise SlideError(f"{slide.path}: no tissue: no tile is covered by {spec.min_tissue:.0%} or more")
    coords = np.stack([np.rint(column * side_px), np.rint(row * side_px)], axis=1).astype(np.int64)
    return Tiling(coords, side_px, tuple(slide.doubts))


def cached_tiling(path: Path, spec: TileSpec, cache: Path, *, mpp_um: float | None = None) -> Tiling:
    """The tiling of a slide file, from `cache` when this file was tiled with these settings before.

    Args:
        mpp_um: level-0 resolution of this slide in place of what its file states.

    Raises:
        SlideError: see `open_slide` and `tile_slide`.
        OSError: the tiling cannot be kept.
    """
    kept = cache / f"{cache_key(path, spec, mpp_um)}.npz"
    try:
        with np.load(kept) as stored:
            return Tiling(stored["coords"], float(stored["side_px"]), tuple(stored["doubts"].tolist()))
    except FileNotFoundError:
        pass
    except DAMAGED:  # cut short by a full disk, say: it is made again
        with suppress(OSError):
            kept.unlink()
    with open_slide(path, default_mpp_um=spec.default_mpp_um, mpp_um=mpp_um) as slide:
        tiling = tile_slide(slide, spec)
    with replacing(kept) as unfinished:
        np.savez(unfinished, coords=tiling.coords, side_px=tiling.side_px, doubts=np.array(tiling.doubts, dtype=str))
    return tiling


def find_tissue(slide: Slide, side_px: float, columns: int, rows: int) -> np.ndarray:
    """Mask of the tissue, bool `[rows · 8, columns · 8]`, aligned with the grid. Pen marks count as tissue.

    Raises:
        SlideError: the slide is dark, or cannot be read.
    """
    mask_mpp_um = max(slide.mpp_um, slide.mpp_um * side_px / MASK_PX_PER_TILE)
    bands = slide.read_bands((columns * MASK_PX_PER_TILE, rows * MASK_PX_PER_TILE), mask_mpp_um)
    looked_at = [stain_saturation(band) for band in bands]
    light = np.concatenate([light for _, light in looked_at]).mean()
    if light < LEAST_LIGHT:
        raise SlideError(
            f"{slide.path}: no tissue: the slide is dark ({light:.1%} of it is above {LIGHT_LEVEL} of 255 in all three "
            "colours), as fluorescence and unlit scans are; slides must be stained, and scanned in white light"
        )
    saturation = np.concatenate([saturation for saturation, _ in looked_at])
    return saturation > np.clip(_otsu(saturation), LOWEST_THRESHOLD, HIGHEST_THRESHOLD)


def stain_saturation(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Saturation of each pixel as far as stain causes it, and which pixels let light of every colour through.

    Args:
        image: uint8 `[h, w, 3]`, RGB.

    Returns:
        HSV saturation, fp32 `[h, w]`, 0 where a pixel is too dark or its absorption too grey for stain; bool `[h, w]`.
    """
    levels = np.maximum(image, 1).astype(np.float32)  # a density of black is not defined
    lowest, highest = levels.min(axis=-1), levels.max(axis=-1)
    # The densities -log10(level / 255) of the least and the most absorbed colour.
    least, most = (-np.log10(channel / 255) for channel in (highest, lowest))
    luminance = levels @ np.array([0.299, 0.587, 0.114], np.float32)
    stained = (luminance >= DARKEST_TISSUE) & (most - least >= LEAST_ABSORPTION_CONTRAST * most)
    return np.where(stained, (highest - lowest) / highest, 0).astype(np.float32), lowest >= LIGHT_LEVEL


def _otsu(values: np.ndarray) -> float:
    """Otsu's threshold; 0 for an image of one value, which has none."""
    return float(threshold_otsu(values)) if np.ptp(values) > 0 else 0.0


def cache_key(path: Path, spec: TileSpec, mpp_um: float | None = None) -> str:
    """Name for what is kept about a slide's tiles; it changes with the file and the settings, so that none is stale.

    Args:
        mpp_um: level-0 resolution of this slide in place of what its file states.

    Raises:
        SlideUnavailableError: the file cannot be looked at now.
        SlideError: there is no such file.
    """
    try:
        status, resolved = path.stat(), path.resolve()
    except OSError as error:
        raise fault(f"cannot open {path}", error) from None
    key = [str(resolved), status.st_size, status.st_mtime_ns, asdict(spec)]
    key += [mpp_um, VERSION, MASK_PX_PER_TILE, LOWEST_THRESHOLD, HIGHEST_THRESHOLD]
    key += [LEAST_ABSORPTION_CONTRAST, DARKEST_TISSUE, LIGHT_LEVEL, LEAST_LIGHT]
    return f"{file_name(path.stem)}-{hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()}"
