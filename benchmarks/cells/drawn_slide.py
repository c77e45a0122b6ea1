"""A slide with as many tiles as a benchmark reads: pieces of the demo cohort's tissue, over and over."""

from functools import cache
from pathlib import Path

import numpy as np
import tifffile
from einops import rearrange
from imagecodecs import jpeg_encode

from slidescale.engine.data.demo_drawing import MPP_UM, draw_slide

# Tiles in a row of the grid, whatever their number is, so that the first K of two slides are the same.
COLUMNS = 128
PIECE_PX = 256
# Standard deviation of pixel values above which a square shows more than glass or even stroma.
CONTENT = 20.0


def write_slide(path: Path, k: int, tile_px: int) -> None:
    """Write a slide of one level with at least K tiles of `tile_px` px at its own resolution, MPP_UM."""
    width, height = (-(-side * tile_px // PIECE_PX) * PIECE_PX for side in (min(k, COLUMNS), -(-k // COLUMNS)))
    pieces = _pieces()
    chosen = np.random.default_rng(0).integers(len(pieces), size=(width // PIECE_PX) * (height // PIECE_PX))
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            (pieces[index] for index in chosen),
            shape=(height, width, 3),
            dtype=np.uint8,
            tile=(PIECE_PX, PIECE_PX),
            photometric="rgb",
            compression="jpeg",
            description=f"Aperio Image Library (drawn by slidescale)\r\n{width}x{height} [0,0 {width}x{height}] "
            f"({PIECE_PX}x{PIECE_PX}) JPEG/RGB Q=80|AppMag = 20|MPP = {MPP_UM}",
            software=False,
            metadata=None,
        )


def tile_coords(k: int, tile_px: int) -> np.ndarray:
    """Return int64 `[K, 2]`: the corners (x, y) of the first K tiles in reading order, px."""
    index = np.arange(k)
    return np.stack([index % COLUMNS, index // COLUMNS], axis=1) * tile_px


@cache
def _pieces() -> list[bytes]:
    """Draw a slide, and return its squares that show tissue, as JPEG."""
    image = draw_slide(np.random.default_rng(0), atypical=True)
    rows, columns = (side // PIECE_PX for side in image.shape[:2])
    squares = rearrange(
        image[: rows * PIECE_PX, : columns * PIECE_PX], "(r h) (c w) x -> (r c) h w x", h=PIECE_PX, w=PIECE_PX
    )
    shown = (np.ascontiguousarray(square) for square in squares if square.std() > CONTENT)
    return [jpeg_encode(square, level=80, colorspace="rgb", outcolorspace="ycbcr") for square in shown]
