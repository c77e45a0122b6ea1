"""Slides: their size and resolution, and regions of them at any resolution, whichever reader opens the file."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from slidescale.engine.data.openslide import OpenSlideFile
from slidescale.engine.data.pyramid import ROUNDING_PX, Level, Span, level_downsample, same_picture, span
from slidescale.engine.data.resolution import resolution
from slidescale.engine.errors import SlideError

# How far the levels of a pyramid may miss a wanted resolution, and still be taken as they are or enlarged to it.
RESOLUTION_TOLERANCE = 0.02
# Level-0 pixels of one band of a large region.
BAND_PX = 2**24
# Beyond this reduction Pillow's Hamming filter is closer to the mean over a pixel's area, below it the triangle. On
# real H&E what is read differs from that mean by less than 2 grey levels in the mean, and less than 3 RMS.
HAMMING_FROM = 1.35


def open_slide(path: Path, *, default_mpp_um: float | None = None, mpp_um: float | None = None) -> "Slide":
    """Open a slide with the reader of its kind of file. Another reader is a class like `OpenSlideFile`, chosen here.

    Args:
        default_mpp_um: level-0 resolution in µm per pixel for a file that states none, or an impossible one.
        mpp_um: level-0 resolution in place of what the file states.

    Raises:
        SlideUnavailableError: the file cannot be read now.
        SlideError: not readable as a slide, or of unknown resolution.
    """
    return Slide(path, OpenSlideFile(path), default_mpp_um=default_mpp_um, mpp_um=mpp_um)


class SlideFile(Protocol):
    """An open file, as far as a reader must answer for it; `Slide` makes everything else of these answers.

    It must be safe to read from several threads.

    Attributes:
        sizes: (width, height) of each level in its pixels, from fine to coarse; the first is level 0.
        steps: for each level, how many of the units that `read` takes its place in make one of the level's pixels: 1
            where places are in the level's own pixels, the level's downsample where they are in level-0 pixels.
        properties: what the file states, under OpenSlide's names: `openslide.mpp-x`, `openslide.mpp-y`,
            `openslide.objective-power`, `openslide.bounds-x` and so on; any of them may be missing.
    """

    sizes: Sequence[tuple[int, int]]
    steps: Sequence[float]
    properties: Mapping[str, str]

    def read(self, level: int, place: tuple[int, int], size_px: tuple[int, int]) -> Image.Image:
        """Stored pixels of a level, RGB of `size_px` (width, height); parts without data have the background colour.

        Raises:
            SlideUnavailableError: the file cannot be read now.
            SlideError: the file is damaged here.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class Bounds(NamedTuple):
    """The part of the plane that was scanned, in level-0 pixels; viewers such as QuPath show nothing else."""

    x: int
    y: int
    width: int
    height: int


# The good levels of a file, and sentences on the rest, by path, size and time of change: checked once per process, for
# slides are opened again and again.
_checked: dict[tuple[str, int, int], tuple[tuple[Level, ...], tuple[str, ...]]] = {}


class Slide:
    """An open whole-slide image, which `open_slide` makes.

    Safe to read from several threads. A slide that raised must be opened anew: libraries such as OpenSlide refuse every
    read after a failed one.

    Args:
        file: as a reader has opened it; closed with the slide, also where this raises.
        default_mpp_um, mpp_um: see `open_slide`.

    Attributes:
        mpp_um: level-0 resolution, µm per pixel.
        width, height: level-0 size in pixels.
        bounds: the scanned part; the whole where the file states none.
        doubts: what is odd about the slide, each a sentence for the log that names the file.

    Raises:
        SlideError: of unknown resolution.
    """

    def __init__(
        self, path: Path, file: SlideFile, *, default_mpp_um: float | None = None, mpp_um: float | None = None
    ) -> None:
        self.path = path = Path(path)
        self._file = file
        self.width, self.height = file.sizes[0]
        self.bounds = _bounds(file)
        try:
            self.mpp_um, doubts = resolution(file.properties, default_mpp_um, mpp_um)
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
            mpp_um: resolution of the result, µm per pixel.

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
        rows_per_band = max(1, int(BAND_PX / (width * downsample**2)))
        for first in range(0, height, rows_per_band):
            rows = min(rows_per_band, height - first)
            yield self.read(0, first * downsample, (width, rows), mpp_um)

    def overview(self, max_px: int) -> np.ndarray:
        """The whole slide, uint8 `[h, w, 3]`, its longer side `max_px` (or its own, where that is less)."""
        downsample = max(1.0, max(self.width, self.height) / max_px)
        size_px = (max(1, int(self.width / downsample)), max(1, int(self.height / downsample)))
        return np.concatenate(list(self.read_bands(size_px, self.mpp_um * downsample)))

    def levels(self) -> tuple[Level, ...]:
        """The levels that show what level 0 shows, where it shows it, from fine to coarse; the rest is not read.

        A level whose width and height are not level 0's divided by one number was padded, or is another picture; and
        one of the right shape is compared with the next finer good level in a few places. Files have both kinds of
        fault, from converters to DICOM and TIFF, and readers take every level on trust. What is found is added to
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

    def _level_for(self, downsample: float) -> Level:
        """The coarsest level that has the detail of a downsample; where none could but level 0, none is checked."""
        limit = downsample * (1 + RESOLUTION_TOLERANCE)
        if all(self.width / width + self.height / height > 2 * limit for width, height in self._file.sizes[1:]):
            return self._level_0
        return [level for level in self.levels() if max(level.downsample) <= limit or level.number == 0][-1]

    @property
    def _level_0(self) -> Level:
        return Level(0, self.width, self.height, (1.0, 1.0))

    def _check_levels(self) -> tuple[tuple[Level, ...], tuple[str, ...]]:
        """The good levels, and a sentence on each of the rest."""
        good, doubts = [self._level_0], []
        for index, (width, height) in enumerate(self._file.sizes[1:], start=1):
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
        steps = self._file.steps[level.number]
        across, down = (
            span(start / stored, wanted * downsample / stored, wanted, whole, steps)
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
        image = self._file.read(level.number, place, (taken[0], taken[1]))
        missing = (across.size - taken[0], down.size - taken[1])
        if any(missing):
            pixels = np.pad(np.asarray(image), ((0, missing[1]), (0, missing[0]), (0, 0)), mode="edge")
            image = Image.fromarray(pixels)
        return image


def _bounds(file: SlideFile) -> Bounds:
    """The scanned part that a file states."""
    names = ("x", "y", "width", "height")
    stated = [file.properties.get(f"openslide.bounds-{name}") for name in names]
    whole = (0, 0, *file.sizes[0])
    x, y, width, height = (
        default if value is None else int(value) for value, default in zip(stated, whole, strict=True)
    )
    return Bounds(x, y, width, height)
