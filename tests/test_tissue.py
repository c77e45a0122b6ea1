"""What is tissue, and what is only dark."""

from pathlib import Path

import numpy as np
import openslide
import pytest

from slidescale.engine.data.slide import open_slide
from slidescale.engine.data.tiling import TileSpec, cache_key, stain_saturation, tile_slide
from slidescale.engine.errors import SlideError

from support.slides import write_tiff

SPEC = TileSpec(tile_px=64, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)
MARGIN = 256


@pytest.fixture(scope="module")
def demo_image(demo_manifest: Path) -> np.ndarray:
    with openslide.OpenSlide(demo_manifest.parent / "slides" / "slide-000.svs") as file:
        return np.asarray(file.read_region((0, 0), 0, file.dimensions).convert("RGB"))


def cells_of(path: Path) -> set[tuple[int, int]]:
    with open_slide(path) as slide:
        return set(map(tuple, tile_slide(slide, SPEC).cells.tolist()))


def around(image: np.ndarray, colour: tuple[int, int, int], noise: float) -> np.ndarray:
    """A picture within a margin of that colour, which a scanner, a shadow or a converter has left dark."""
    height, width = image.shape[:2]
    shape = (height + 2 * MARGIN, width + 2 * MARGIN, 3)
    canvas = np.clip(np.random.default_rng(0).normal(colour, noise, shape), 0, 255).astype(np.uint8)
    canvas[MARGIN : MARGIN + height, MARGIN : MARGIN + width] = image
    return canvas


@pytest.mark.parametrize(
    ("colour", "noise"),
    [
        ((30, 30, 36), 2),  # a coverslip's shadow
        ((22, 20, 26), 2),
        ((2, 2, 2), 2),  # a black margin and a camera's noise
        ((95, 93, 105), 3),  # a lighter shadow
        ((18, 20, 70), 3),  # dark blue ink
        ((40, 38, 44), 6),
    ],
)
def test_dark_margins_are_not_tissue(
    demo_image: np.ndarray, tmp_path: Path, colour: tuple[int, int, int], noise: float
) -> None:
    tissue = cells_of(write_tiff(tmp_path / "plain.tif", around(demo_image, (240, 238, 240), 1), 0.5))
    dark = cells_of(write_tiff(tmp_path / "dark.tif", around(demo_image, colour, noise), 0.5))
    edge = MARGIN // 64
    assert all(edge <= column < edge + 29 and edge <= row < edge + 31 for column, row in dark), "within the picture"
    assert len(tissue) > 300
    # The margin moves Otsu's threshold a little, and with it a few tiles at the edge of tissue.
    assert len(dark ^ tissue) <= 0.02 * len(tissue)


def fluorescence(height: int, width: int) -> np.ndarray:
    """Blue and green nuclei on black."""
    random = np.random.default_rng(0)
    image = random.integers(0, 4, (height, width, 3)).astype(np.uint8)
    for colour in ((10, 20, 210), (5, 180, 20)):
        for y, x in random.integers(0, (height - 40, width - 40), (250, 2)):
            image[y : y + 40, x : x + 40] = colour
    return image


@pytest.mark.parametrize("kind", ["black", "fluorescence", "unlit"])
def test_a_dark_slide_is_set_aside(tmp_path: Path, kind: str) -> None:
    if kind == "fluorescence":
        image = fluorescence(1024, 1024)
    else:
        image = np.random.default_rng(0).integers(0, 4, (1024, 1024, 3)).astype(np.uint8)
        image += np.array((0, 0, 0) if kind == "black" else (28, 28, 36), np.uint8)
    with (
        open_slide(write_tiff(tmp_path / "s.tif", image, 0.5)) as slide,
        pytest.raises(SlideError, match=r"s.tif: no tissue: the slide is dark .* fluorescence"),
    ):
        tile_slide(slide, SPEC)


@pytest.mark.parametrize(
    ("colour", "is_stained"),
    [
        ((150, 110, 190), True),  # haematoxylin
        ((235, 215, 230), True),  # pale stroma
        ((200, 205, 225), True),  # the pale blue counterstain of immunohistochemistry
        ((120, 80, 50), True),  # DAB
        ((75, 45, 30), True),  # much of it
        ((150, 40, 60), True),  # blood
        ((60, 40, 75), True),  # a fold
        ((245, 245, 245), False),
        ((120, 118, 125), False),  # a shadow
        ((15, 15, 20), False),
        ((20, 20, 90), False),  # dark blue ink
        ((0, 0, 200), False),  # a nucleus that shines blue
    ],
)
def test_stains_and_shades(colour: tuple[int, int, int], is_stained: bool) -> None:
    saturation, _ = stain_saturation(np.full((1, 1, 3), colour, np.uint8))
    assert bool(saturation > 0.05) == is_stained
    if is_stained:  # as it always was
        assert saturation.item() == pytest.approx((max(colour) - min(colour)) / max(colour))


def test_real_tissue_is_judged_by_its_saturation(real_slide: Path) -> None:
    """Of what its saturation makes tissue, less than one pixel in a thousand is lost, at the resolution of a mask."""
    with open_slide(real_slide) as slide:
        image = slide.read(0, 0, (79, 105), 0.5 * 224 / 8)
    saturation, light = stain_saturation(image)
    levels = image.astype(np.float32)
    plain = np.ptp(levels, axis=2) / levels.max(axis=2)
    tissue = plain > 0.05
    assert tissue.mean() > 0.3
    assert (saturation[tissue] == 0).mean() < 0.001
    assert light.mean() > 0.8


def test_pen_is_taken_as_tissue(tmp_path: Path) -> None:
    """As README says."""
    image = np.full((1024, 1024, 3), 245, np.uint8)
    image[300:700, 300:700] = (30, 60, 200)
    assert len(cells_of(write_tiff(tmp_path / "s.tif", image, 0.5))) > 20


def test_what_is_kept_of_a_slide_is_named_by_its_resolution(real_slide: Path) -> None:
    keys = {cache_key(real_slide, SPEC, mpp_um) for mpp_um in (None, 0.499, 0.25)}
    assert len(keys) == 3
