"""Slide files by way of OpenSlide: the only file that imports it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import openslide
from PIL import Image

from slidescale.engine.data.retry import reading

UNSUPPORTED = (
    "it is not of a kind that OpenSlide reads (Aperio SVS, DICOM, Hamamatsu NDPI and VMS, Leica SCN, MIRAX, Philips "
    "TIFF, Sakura, Trestle, Ventana BIF, Zeiss CZI, and other TIFFs that are stored in tiles); other pictures, such as "
    "PNG, JPEG and TIFFs in strips, must be made tiled TIFFs first (vips tiffsave in.png out.tif --tile --pyramid)"
)
FAILURES = (openslide.OpenSlideError, OSError)


class OpenSlideFile:
    """A file that OpenSlide reads; see `slide.SlideFile` for what it answers.

    What fails is tried again (see `retry.reading`). OpenSlide refuses every read after a failed one, so the file is
    then opened anew.

    Raises:
        SlideUnavailableError: the file cannot be read now.
        SlideError: it is not there, or OpenSlide does not read it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = reading(path, f"cannot open {path}", self._open, FAILURES)
        self.sizes: Sequence[tuple[int, int]] = self._file.level_dimensions
        # Places are in level-0 pixels, and OpenSlide divides them by the mean of a level's downsamples over both axes.
        self.steps: Sequence[float] = self._file.level_downsamples
        self.properties: Mapping[str, str] = self._file.properties
        self._background = f"#{self.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, 'ffffff')}"

    def read(self, level: int, place: tuple[int, int], size_px: tuple[int, int]) -> Image.Image:
        """Stored pixels of a level, RGB, from `place` in level-0 pixels on.

        Raises:
            SlideUnavailableError: the file cannot be read now.
            SlideError: it is damaged here.
        """

        def attempt() -> Image.Image:
            file = self._file
            try:
                return file.read_region(place, level, size_px)
            except openslide.OpenSlideError:
                if file is self._file:  # not closed here: another thread may be reading from it
                    self._file = self._open()
                    return self._file.read_region(place, level, size_px)
                raise

        what = f"{self._path}: cannot read at ({place[0]}, {place[1]})"
        return self._flatten(reading(self._path, what, attempt, FAILURES))

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except openslide.OpenSlideUnsupportedFormatError:  # which says the same of a file that is not there
            raise openslide.OpenSlideError(UNSUPPORTED) from None

    def _flatten(self, region: Image.Image) -> Image.Image:
        """RGBA to RGB; most tiles are opaque, which is a cheap look at their alpha band."""
        if region.getchannel("A").getextrema() == (255, 255):
            return region.convert("RGB")
        image = Image.new("RGB", region.size, self._background)
        image.paste(region, mask=region.getchannel("A"))
        return image
