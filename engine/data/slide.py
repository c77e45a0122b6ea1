"""Slide files: the only place that knows OpenSlide."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import openslide
from PIL import Image

from slidescale.engine.data.retry import reading
from slidescale.engine.errors import SlideError

# How far the levels of a pyramid may miss a wanted resolution, and still be taken as they are or enlarged to it.
RESOLUTION_TOLERANCE = 0.02
# Level-0 pixels of one band of a large region.
BAND_PX = 2**24


class Slide:
    """An open whole-slide image.

    Safe to read from several threads. What fails is tried again (see `retry.reading`); a slide that raised must be
    opened anew, for OpenSlide refuses every read after a failed one.

    Args:
        default_mpp_um: level-0 resolution in µm a pixel for a file that states none.

    Attributes:
        mpp_um: level-0 resolution, µm a pixel.
        width, height: level-0 size in pixels.

    Raises:
        SlideUnavailableError: the file cannot be read now.
        SlideError: not readable as a slide, or of unknown resolution.
    """

    def __init__(self, path: Path, *, default_mpp_um: float | None = None) -> None:
        self.path = path
        self._file = reading(path, f"cannot open {path}", self._open, (openslide.OpenSlideError, OSError))
        self.width, self.height = self._file.dimensions
        try:
            self.mpp_um = _resolution(self._file, default_mpp_um)
        except SlideError as error:
            self.close()
            raise SlideError(f"{path}: {error}") from None

    def read(self, x: int, y: int, size_px: tuple[int, int], mpp_um: float) -> np.ndarray:
        """Read a region at a resolution.

        Args:
            x, y: top left corner, in level-0 pixels.
            size_px: (width, height) of the result, in pixels at `mpp_um`.
            mpp_um: resolution of the result, µm a pixel.

        Returns:
            uint8 `[height, width, 3]`, RGB; parts without data have the slide's background colour.

        Raises:
            SlideUnavailableError: the file cannot be read now.
            SlideError: the file is damaged here, or coarser than `mpp_um`.
        """
        self.check_resolution(mpp_um)
        downsample = mpp_um / self.mpp_um
        level = self._file.get_best_level_for_downsample(downsample * (1 + RESOLUTION_TOLERANCE))
        remainder = downsample / self._file.level_downsamples[level]
        stored_px = (max(1, round(size_px[0] * remainder)), max(1, round(size_px[1] * remainder)))
        region = self._read_region((x, y), level, stored_px)
        image = self._flatten(region)
        if stored_px != size_px:
            # Pillow's bilinear filter widens with the reduction, so it averages and does not alias.
            image = image.resize(size_px, Image.Resampling.BILINEAR)
        return np.asarray(image)

    def check_resolution(self, mpp_um: float) -> None:
        """Raise SlideError if the slide is coarser than `mpp_um`: detail that was not scanned cannot be read."""
        if mpp_um < self.mpp_um * (1 - RESOLUTION_TOLERANCE):
            raise SlideError(f"{self.path}: has {self.mpp_um:.3g} µm/px, coarser than the {mpp_um:.3g} µm/px wanted")

    def read_bands(self, size_px: tuple[int, int], mpp_um: float) -> Iterator[np.ndarray]:
        """Read a large region from the slide's corner, in bands uint8 `[h, width, 3]` from top to bottom.

        A band takes about as many stored pixels as `BAND_PX`, so that a file without a pyramid does not fill memory.
        """
        width, height = size_px
        downsample = mpp_um / self.mpp_um
        rows_a_band = max(1, int(BAND_PX / (width * downsample**2)))
        for first in range(0, height, rows_a_band):
            rows = min(rows_a_band, height - first)
            yield self.read(0, round(first * downsample), (width, rows), mpp_um)

    def overview(self, max_px: int) -> np.ndarray:
        """The whole slide, uint8 `[h, w, 3]`, its longer side `max_px` (or its own, where that is less)."""
        downsample = max(1.0, max(self.width, self.height) / max_px)
        size_px = (max(1, int(self.width / downsample)), max(1, int(self.height / downsample)))
        return np.concatenate(list(self.read_bands(size_px, self.mpp_um * downsample)))

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> openslide.OpenSlide:
        return openslide.OpenSlide(self.path)

    def _read_region(self, place: tuple[int, int], level: int, size_px: tuple[int, int]) -> Image.Image:
        """Stored pixels, RGBA, from level-0 (x, y) `place` on."""

        def attempt() -> Image.Image:
            file = self._file
            try:
                return file.read_region(place, level, size_px)
            except openslide.OpenSlideError:
                if file is self._file:  # not closed here: another thread may be reading from it
                    self._file = self._open()
                    return self._file.read_region(place, level, size_px)
                raise

        return reading(
            self.path, f"{self.path}: cannot read at ({place[0]}, {place[1]})", attempt,
            (openslide.OpenSlideError, OSError),
        )  # fmt: skip

    def _flatten(self, region: Image.Image) -> Image.Image:
        """RGBA to RGB; most tiles are opaque, which is a cheap look at their alpha band."""
        if region.getchannel("A").getextrema() == (255, 255):
            return region.convert("RGB")
        colour = self._file.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        image = Image.new("RGB", region.size, f"#{colour}")
        image.paste(region, mask=region.getchannel("A"))
        return image


def _resolution(file: openslide.OpenSlide, default_mpp_um: float | None) -> float:
    """Level-0 µm a pixel: the mean of both axes, which must nearly agree, since tiles are square."""
    stated = [file.properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)]
    known = [float(value) for value in stated if value is not None]
    if not known:
        if default_mpp_um is None:
            raise SlideError(
                "states no resolution (openslide.mpp-x); give it with --data.default-mpp-um (of a recipe) or "
                "--default-mpp-um (of slidescale predict)"
            )
        return default_mpp_um
    if min(known) <= 0 or max(known) > min(known) * (1 + RESOLUTION_TOLERANCE):
        raise SlideError(f"states an impossible resolution: {' × '.join(map(str, known))} µm/px")
    return sum(known) / len(known)
