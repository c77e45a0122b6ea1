"""Where a tile's pixels come from: exact places and areas, and levels that can be believed."""

from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from slidescale.engine.data import slide as module
from slidescale.engine.data.prefetch import TileReader, TileRequest
from slidescale.engine.data.pyramid import level_downsample
from slidescale.engine.data.slide import open_slide
from slidescale.engine.data.tiling import TileSpec, exact_corners, tile_slide

from support.slides import write_pyramid

PERIOD_PX = 48.0


def waves(height: int, width: int) -> np.ndarray:
    """Red a wave in x, green one in y: their phases in a tile say where it was read."""
    pixel = 2 * np.pi * (np.arange(max(height, width)) + 0.5) / PERIOD_PX
    wave = np.rint(127.5 + 100 * np.sin(pixel)).astype(np.uint8)
    image = np.full((height, width, 3), 60, np.uint8)
    image[..., 0], image[..., 1] = wave[None, :width], wave[:height, None]
    return image


def displacement(tile: np.ndarray, corner: tuple[float, float], step: float) -> np.ndarray:
    """How far a tile's middle half is from where `corner` (level-0) says, (x, y) in its own pixels, by its phases."""
    n = len(tile)
    part = slice(n // 4, 3 * n // 4)
    found = []
    for begin, line in zip(corner, (tile[..., 0].mean(0)[part], tile[..., 1].mean(1)[part]), strict=True):
        phase = 2 * np.pi * (begin + (np.arange(n)[part] + 0.5) * step) / PERIOD_PX
        a, b, _ = np.linalg.lstsq(np.stack([np.sin(phase), np.cos(phase), np.ones_like(phase)], 1), line, rcond=None)[0]
        found.append(np.arctan2(b, a) * PERIOD_PX / (2 * np.pi) / step)
    return np.array(found)


@pytest.mark.parametrize(
    ("stored_um", "wanted_um", "reduced"), [(0.2527, 0.5, 0), (0.2631, 0.5, 0), (0.499, 0.5, 0), (0.2527, 1.0, 4)]
)
def test_tiles_lie_where_they_are_said_to(tmp_path: Path, stored_um: float, wanted_um: float, reduced: int) -> None:
    image = waves(2051, 2051)  # no multiple of 4: the level's last pixels are dropped, as scanners do
    levels = [image] + ([np.asarray(Image.fromarray(image[:2048, :2048]).reduce(reduced))] if reduced else [])
    path = write_pyramid(tmp_path / "s.tif", levels, stored_um)
    spec = TileSpec(tile_px=64, mpp_um=wanted_um, min_tissue=0.5, default_mpp_um=None)
    with open_slide(path) as slide:
        assert len(slide.levels()) == len(levels)
        side = spec.side_px(slide)
    last = int(2051 / side) - 1
    cells = np.array([[0, 0], [3, 5], [last, 1], [2, last], [last, last]])
    coords = np.rint(cells * side).astype(np.int64)
    assert side % 1 > 0.05
    assert (coords != cells * side).any(), "or rounding goes untested"
    reader = TileReader(spec, threads=1, pin=False)
    try:
        (reading,) = reader.ahead([TileRequest(path, coords)], 0)
        tiles = reading.wait().numpy()
    finally:
        reader.close()
    shifts = [
        displacement(tile, corner, side / 64)
        for tile, corner in zip(tiles, exact_corners(coords, side).tolist(), strict=True)
    ]
    assert np.abs(shifts).max() < 0.05
    rounded = displacement(tiles[-1], tuple(coords[-1] + 1), side / 64)
    assert np.abs(rounded).max() > 0.1, "the measure can fail"


def area_mean(image: np.ndarray, begin: tuple[float, float], side: float, n: int) -> np.ndarray:
    """The definition: the mean of an image, constant over each of its pixels, over each pixel's area."""
    for axis, start in ((1, begin[0]), (0, begin[1])):
        edges = start + side * np.arange(n + 1) / n
        pixels = np.arange(image.shape[axis])
        right, left = (np.clip(edge[:, None] - pixels, 0, 1) for edge in (edges[1:], edges[:-1]))
        image = np.moveaxis(np.tensordot((right - left) * n / side, image, (1, axis)), 0, axis)
    return image


@pytest.mark.parametrize("stored_um", [0.125, 0.25, 0.2527, 0.2631, 0.33, 0.37, 0.4, 0.499])
def test_pixels_are_means_over_their_area(real_slide: Path, tmp_path: Path, stored_um: float) -> None:
    with openslide.OpenSlide(real_slide) as file:
        image = np.asarray(file.read_region((500, 800), 0, (1024, 1024)).convert("RGB"))
    path = write_pyramid(tmp_path / "s.tif", [image], stored_um)
    side = 160 * 0.5 / stored_um
    corner = (side / 2, side / 4)
    with open_slide(path) as slide:
        ours = slide.read(*corner, (160, 160), 0.5)
        mean = area_mean(image.astype(np.float64), corner, 160 * 0.5 / slide.mpp_um, 160)
    difference = ours - mean
    whole = stored_um in (0.125, 0.25)  # of whole pixels there is only rounding
    assert np.abs(difference).mean() < (0.6 if whole else 2.0)
    assert np.sqrt((difference**2).mean()) < (0.7 if whole else 3.0)
    assert abs(difference.mean()) < 0.6
    assert image.std() > 40


def test_what_needs_no_resampling_is_not_resampled(real_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object, **__: object) -> None:
        raise AssertionError("resampled")

    monkeypatch.setattr(Image.Image, "resize", no)
    with open_slide(real_slide) as slide:
        whole = slide.read(100, 200, (64, 64), 0.499)
        np.testing.assert_array_equal(slide.read(100 + 1e-9, 200, (64, 64), 0.499), whole)
        with pytest.raises(AssertionError, match="resampled"):
            slide.read(100.2, 200, (64, 64), 0.499)


@pytest.mark.parametrize("size", [(1001, 1003), (1024, 1024)])
def test_borders_do_not_fade(tmp_path: Path, size: tuple[int, int]) -> None:
    """A picture of one colour has it up to the last pixel, where its level ends a little early, too."""
    height, width = size
    colour = (200, 90, 150)
    image = np.broadcast_to(np.array(colour, np.uint8), (height, width, 3)).copy()
    path = write_pyramid(tmp_path / "s.tif", [image, image[: height // 4, : width // 4]], 0.2527)
    with open_slide(path) as slide:
        for mpp_um in (0.5, 1.1):
            step = mpp_um / slide.mpp_um
            n = int(min(size) / step)
            corner = (width - n * step, height - n * step)
            assert (slide.read(*corner, (n, n), mpp_um) == colour).all()
            assert (slide.read(0, 0, (n, n), mpp_um) == colour).all()
        bands = np.concatenate(list(slide.read_bands((200, 200), 0.9)))
        assert (bands == colour).all()
        beyond = slide.read(width - 50, 0, (100, 50), slide.mpp_um)
        assert (beyond[:, :50] == colour).all()
        assert (beyond[:, 51:] == 255).all()


def test_bands_are_one_picture(real_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(real_slide) as slide:
        whole = np.concatenate(list(slide.read_bands((400, 500), 2.3)))
        monkeypatch.setattr(module, "BAND_PX", 100_000)
        bands = list(slide.read_bands((400, 500), 2.3))
    assert len(bands) > 5
    # A sum rounded otherwise may be a level off; a seam would be many.
    assert np.abs(np.concatenate(bands).astype(int) - whole).max() <= 1


@pytest.mark.parametrize(
    ("full", "size", "expected"),
    [
        ((46000, 32914), (11500, 8228), (4.0, 4.0)),
        ((46000, 32914), (2875, 2057), (16.0, 16.0)),
        ((1001, 999), (501, 500), (2.0, 2.0)),
        ((3000, 1500), (1000, 500), (3.0, 3.0)),
        ((30011, 10000), (10004, 3333), (30011 / 10004, 10000 / 3333)),
        ((1855, 1941), (1024, 1024), None),
        ((71 * 512, 40 * 512), (37 * 512, 20 * 512), None),
    ],
)
def test_level_downsample(full: tuple[int, int], size: tuple[int, int], expected: tuple[float, float] | None) -> None:
    assert level_downsample(full, size) == (None if expected is None else pytest.approx(expected, rel=1e-12))


@pytest.fixture
def demo_image(demo_manifest: Path) -> np.ndarray:
    with openslide.OpenSlide(demo_manifest.parent / "slides" / "slide-000.svs") as file:
        return np.asarray(file.read_region((0, 0), 0, file.dimensions).convert("RGB"))


@pytest.mark.parametrize("fault", ["padded", "padded in proportion", "another picture", "blank", "moved"])
def test_levels_that_do_not_fit_are_not_read(
    demo_image: np.ndarray, real_slide: Path, tmp_path: Path, fault: str
) -> None:
    """Tiles are chosen and read as if the level were not there, and it is named."""
    height, width = demo_image.shape[:2]
    half = np.asarray(Image.fromarray(demo_image).reduce(2))
    if fault == "padded":
        level = np.full((1024, 1024, 3), 255, np.uint8)
        level[: half.shape[0], : half.shape[1]] = half
    elif fault == "padded in proportion":
        level = np.full((round(half.shape[0] * 1.03), round(half.shape[1] * 1.03), 3), 255, np.uint8)
        level[: half.shape[0], : half.shape[1]] = half
    elif fault == "another picture":
        with openslide.OpenSlide(real_slide) as file:
            level = np.asarray(file.get_thumbnail((2000, 2000)).resize((width // 3, height // 3)))
    elif fault == "blank":
        level = np.full_like(half, 255)
    else:
        level = np.roll(half, 8, axis=1)
    spec = TileSpec(tile_px=64, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)
    with open_slide(write_pyramid(tmp_path / "plain.tif", [demo_image], 0.5)) as slide:
        expected, plain = tile_slide(slide, spec), slide.read(300, 400, (200, 200), 1.6)
    path = write_pyramid(tmp_path / "bad.tif", [demo_image, level], 0.5)
    with open_slide(path) as slide:
        found = tile_slide(slide, spec)
        np.testing.assert_array_equal(found.coords, expected.coords)
        np.testing.assert_array_equal(slide.read(300, 400, (200, 200), 1.6), plain)
    assert len(found.doubts) == 1
    assert "bad.tif: level 1 (" in found.doubts[0]
    assert "is not used" in found.doubts[0]


def test_good_levels_are_read_and_checked_once(
    demo_image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they were reduced."""
    picture = Image.fromarray(demo_image)
    levels = [demo_image, np.asarray(picture.reduce(2)), demo_image[::4, ::4], np.asarray(picture.resize((115, 121)))]
    path = write_pyramid(tmp_path / "s.tif", levels, 0.5)
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.levels()] == [(d, d) for d in (1, 2, 4, 16)]
        assert slide.doubts == []
    monkeypatch.setattr(module, "same_picture", None)
    with open_slide(path) as slide:
        assert len(slide.levels()) == 4
