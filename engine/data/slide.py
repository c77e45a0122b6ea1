"""Slide files: the only place that knows OpenSlide."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import openslide
from PIL import Image

from slidescale.engine.data.pyramid import ROUNDING_PX, Level, Span, level_downsample, same_picture, span
from slidescale.engine.data.resolution import resolution
from slidescale.engine.data.retry import reading
from slidescale.engine.errors import SlideError

# How far the levels of a pyramid may miss a wanted resolution, and still be taken as they are or enlarged to it.
RESOLUTION_TOLERANCE = 0.02
# Level-0 pixels of one band of a large region.
BAND_PX = 2**24
# Beyond this reduction Pillow's Hamming filter is closer to the mean over a pixel's area, below it the triangle. On
# real H&E what is read differs from that mean by less than 2 grey levels in the mean, and less than 3 RMS.
HAMMING_FROM = 1.35
UNSUPPORTED = (
    "it is not of a kind that OpenSlide reads (Aperio SVS, DICOM, Hamamatsu NDPI and VMS, Leica SCN, MIRAX, Philips "
    "TIFF, Sakura, Trestle, Ventana BIF, Zeiss CZI, and other TIFFs that are stored in tiles); other pictures, such as "
    "PNG, JPEG and TIFFs in strips, must be made tiled TIFFs first (vips tiffsave in.png out.tif --tile --pyramid)"
)


class Bounds(NamedTuple):
    """The part of the plane that was scanned, in level-0 pixels; viewers such as QuPath show nothing else."""

    x: int
    y: int
    width: int
    height: int


# Which levels of a file are good, and what is to be said of the others, by path, size and time of change: looked at
# once a process, since slides are opened again and again.
_checked: dict[tuple[str, int, int], tuple[tuple[Level, ...], tuple[str, ...]]] = {}


class Slide:
    """An open whole-slide image.

    Safe to read from several threads. What fails is tried again (see `retry.reading`); a slide that raised must be
    opened anew, for OpenSlide refuses every read after a failed one.

    Args:
        default_mpp_um: level-0 resolution in µm a pixel for a file that states none, or an impossible one.
        mpp_um: level-0 resolution in place of what the file states.

    Attributes:
        mpp_um: level-0 resolution, µm a pixel.
        width, height: level-0 size in pixels.
        bounds: the scanned part; the whole where the file states none.
        doubts: what is odd about the slide, each a sentence for the log, which names the file.

    Raises:
        SlideUnavailableError: the file cannot be read now.
        SlideError: not readable as a slide, or of unknown resolution.
    """

    def __init__(self, path: Path, *, default_mpp_um: float | None = None, mpp_um: float | None = None) -> None:
        self.path = path = Path(path)
        self._file = reading(path, f"cannot open {path}", self._open, (openslide.OpenSlideError, OSError))
        self.width, self.height = self._file.dimensions
        self.bounds = _bounds(self._file)
        try:
            self.mpp_um, doubts = resolution(self._file.properties, default_mpp_um, mpp_um)
        except SlideError as error:
            self.close()
            raise SlideError(f"{path}: {error}") from None
        self.doubts = [f"{path}: {doubt}" for doubt in doubts]
        self._levels: tuple[Level, ...] | None = None

    def read(self, x: float, y: float, size_px: tuple[int, int], mpp_um: float) -> np.ndarray:
        """Read a region at a resolution, right to a few hundredths of a pixel of the result.

        Each pixel is, nearly, the mean over its area: exactly so where it covers a whole number of stored pixels.

        Args:
            x, y: top left corner, in level-0 pixels and fractions of them.
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
        return np.asarray(self._region(self._level_for(downsample), x, y, size_px, downsample))

    def check_resolution(self, mpp_um: float) -> None:
        """Raise SlideError if the slide is coarser than `mpp_um`: detail that was not scanned cannot be read."""
        if mpp_um < self.mpp_um * (1 - RESOLUTION_TOLERANCE):
            raise SlideError(
                f"{self.path}: has {self.mpp_um:.3g} µm/px, coarser than the {mpp_um:.3g} µm/px wanted "
                "(if that is wrong, state the slide's own in the manifest's column mpp_um)"
            )

    def read_bands(self, size_px: tuple[int, int], mpp_um: float) -> Iterator[np.ndarray]:
        """Read a large region from the slide's corner, in bands uint8 `[h, width, 3]` from top to bottom.

        A band takes about as many stored pixels as `BAND_PX`, so that a file without a pyramid does not fill memory.
        """
        width, height = size_px
        downsample = mpp_um / self.mpp_um
        rows_a_band = max(1, int(BAND_PX / (width * downsample**2)))
        for first in range(0, height, rows_a_band):
            rows = min(rows_a_band, height - first)
            yield self.read(0, first * downsample, (width, rows), mpp_um)

    def overview(self, max_px: int) -> np.ndarray:
        """The whole slide, uint8 `[h, w, 3]`, its longer side `max_px` (or its own, where that is less)."""
        downsample = max(1.0, max(self.width, self.height) / max_px)
        size_px = (max(1, int(self.width / downsample)), max(1, int(self.height / downsample)))
        return np.concatenate(list(self.read_bands(size_px, self.mpp_um * downsample)))

    def levels(self) -> tuple[Level, ...]:
        """The levels that show what level 0 shows, where it shows it, from fine to coarse; others are not read.

        A level whose width and height are not level 0's divided by one number was padded, or is another picture; and
        one of the right shape is compared with the next finer good level in a few places. Files have both kinds of
        fault, from converters to DICOM and TIFF, and OpenSlide takes every level on trust. What is found is added to
        `doubts`.

        Raises:
            SlideError: the file is damaged where it was looked at.
        """
        if self._levels is None:
            try:
                status = self.path.stat()
            except OSError as error:
                raise SlideError(f"cannot read {self.path}: {error.strerror}") from None
            key = (str(self.path.resolve()), status.st_size, status.st_mtime_ns)
            if key not in _checked:
                _checked[key] = self._check_levels()
            self._levels, doubts = _checked[key]
            self.doubts += [f"{self.path}: {doubt}" for doubt in doubts]
        return self._levels

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self.path)
        except openslide.OpenSlideUnsupportedFormatError:  # which says the same of a file that is not there
            raise openslide.OpenSlideError(UNSUPPORTED) from None

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
            self.path,
            f"{self.path}: cannot read at ({place[0]}, {place[1]})",
            attempt,
            (openslide.OpenSlideError, OSError),
        )

    def _level_for(self, downsample: float) -> Level:
        """The coarsest level that has the detail of a downsample; level 0 needs no look at the others."""
        limit = downsample * (1 + RESOLUTION_TOLERANCE)
        if self._file.get_best_level_for_downsample(limit) == 0:
            return self._level_0
        return [level for level in self.levels() if max(level.downsample) <= limit or level.number == 0][-1]

    @property
    def _level_0(self) -> Level:
        return Level(0, self.width, self.height, (1.0, 1.0))

    def _check_levels(self) -> tuple[tuple[Level, ...], tuple[str, ...]]:
        """The good levels, and what is wrong with the others."""
        good, doubts = [self._level_0], []
        for index, (width, height) in enumerate(self._file.level_dimensions[1:], start=1):
            downsample = level_downsample((self.width, self.height), (width, height))
            if downsample is None:
                ratios = f"level 0 is {self.width / width:.4g} times as wide and {self.height / height:.4g} as high"
                doubts.append(f"level {index} ({width} × {height} px) is not used: {ratios}, so it was padded")
            elif max(downsample) < max(good[-1].downsample):
                doubts.append(f"level {index} ({width} × {height} px) is not used: it is finer than the one before")
            elif not same_picture(level := Level(index, width, height, downsample), good[-1], self._look):
                doubts.append(
                    f"level {index} ({width} × {height} px) is not used: it does not show what level "
                    f"{good[-1].number} shows, or shows it elsewhere"
                )
            else:
                good.append(level)
        return tuple(good), tuple(doubts)

    def _look(self, level: Level, x: float, y: float, cells: tuple[int, int], downsample: float) -> np.ndarray:
        """A region as `_region` reads it, in grey levels, fp32 `[h, w]`."""
        return np.asarray(self._region(level, x, y, cells, downsample).convert("L")).astype(np.float32)

    def _region(self, level: Level, x: float, y: float, size_px: tuple[int, int], downsample: float) -> Image.Image:
        """A region of a level, RGB of `size_px`, whose pixels are `downsample` level-0 pixels wide and high."""
        theirs = self._file.level_downsamples[level.number]
        across, down = (
            span(start / stored, wanted * downsample / stored, wanted, whole, theirs)
            for start, stored, wanted, whole in zip(
                (x, y), level.downsample, size_px, (level.width, level.height), strict=True
            )
        )
        image = self._stored(level, across, down)
        if across.whole and down.whole:
            if across.whole == down.whole == 1:
                return image
            return image.reduce((across.whole, down.whole))
        scale = max((axis.end - axis.begin) / px for axis, px in zip((across, down), size_px, strict=True))
        kind = Image.Resampling.HAMMING if scale > HAMMING_FROM else Image.Resampling.BILINEAR
        return image.resize(size_px, kind, box=(across.begin, down.begin, across.end, down.end))

    def _stored(self, level: Level, across: Span, down: Span) -> Image.Image:
        """A level's pixels as they are, RGB; where it ends a little early, by rounding, its last ones are repeated."""
        taken = [
            min(axis.size, whole - axis.first) if 0 < axis.first + axis.size - whole <= ROUNDING_PX else axis.size
            for axis, whole in zip((across, down), (level.width, level.height), strict=True)
        ]
        place = (across.place, down.place)
        image = self._flatten(self._read_region(place, level.number, (taken[0], taken[1])))
        missing = (across.size - taken[0], down.size - taken[1])
        if any(missing):
            pixels = np.pad(np.asarray(image), ((0, missing[1]), (0, missing[0]), (0, 0)), mode="edge")
            image = Image.fromarray(pixels)
        return image

    def _flatten(self, region: Image.Image) -> Image.Image:
        """RGBA to RGB; most tiles are opaque, which is a cheap look at their alpha band."""
        if region.getchannel("A").getextrema() == (255, 255):
            return region.convert("RGB")
        colour = self._file.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        image = Image.new("RGB", region.size, f"#{colour}")
        image.paste(region, mask=region.getchannel("A"))
        return image


def _bounds(file: openslide.OpenSlide) -> Bounds:
    """What the file states to be scanned."""
    names = ("x", "y", "width", "height")
    stated = [file.properties.get(f"openslide.bounds-{name}") for name in names]
    whole = (0, 0, *file.dimensions)
    x, y, width, height = (
        default if value is None else int(value) for value, default in zip(stated, whole, strict=True)
    )
    return Bounds(x, y, width, height)
