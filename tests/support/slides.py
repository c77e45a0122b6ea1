"""Slides of a test's own: drawn, damaged, or on a file system that is away for a while."""

import errno
import os
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile


def write_tiff(path: Path, image: np.ndarray, mpp_um: float | None) -> Path:
    """A tiled TIFF that OpenSlide reads as a slide."""
    resolution = {} if mpp_um is None else {"resolution": (1e4 / mpp_um,) * 2, "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", compression="zlib", **resolution)
    return path


def stained(height: int, width: int) -> np.ndarray:
    """A pink square of tissue, a quarter of the area, in the middle of glass, with a gradient to tell tiles apart."""
    image = np.full((height, width, 3), 245, np.uint8)
    rows, columns = slice(height // 4, 3 * height // 4), slice(width // 4, 3 * width // 4)
    image[rows, columns] = (200, 120, 170)
    image[rows, columns, 1] = np.linspace(90, 150, columns.stop - columns.start).astype(np.uint8)
    return image


def damage(slide: Path) -> None:
    """Blank the second half of the file's pixels: it opens, and cannot be read everywhere."""
    content = bytearray(slide.read_bytes())
    content[2_000 : len(content) // 3] = bytes(len(content) // 3 - 2_000)
    slide.write_bytes(content)


class Away:
    """A file system that is away for some of the system calls that open a file, and OpenSlide with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, calls: int, number: int = errno.EIO) -> None:
        self.left = calls
        self._path, self._number = path, number
        self._open, self._slide = os.open, openslide.OpenSlide
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(openslide, "OpenSlide", self.open_slide)

    def _fails(self, path: object) -> bool:
        if Path(str(path)) != self._path or not self.left:
            return False
        self.left -= 1
        return True

    def open(self, path: object, *args: object, **more: object) -> int:
        if self._fails(path):
            raise OSError(self._number, os.strerror(self._number), path)
        return self._open(path, *args, **more)  # type: ignore[call-overload]

    def open_slide(self, path: Path) -> openslide.OpenSlide:
        if self._fails(path):
            raise openslide.OpenSlideUnsupportedFormatError("Unsupported or missing image file")
        return self._slide(path)


def write_pyramid(path: Path, levels: list[np.ndarray], mpp_um: float) -> Path:
    """A generic TIFF of these levels, the first at `mpp_um`."""
    with tifffile.TiffWriter(path) as file:
        for index, level in enumerate(levels):
            file.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                metadata=None,
                subfiletype=1 if index else 0,
                resolution=(1e4 / mpp_um,) * 2,
                resolutionunit="CENTIMETER",
            )
    return path
