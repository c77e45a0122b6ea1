"""Slides, tilings and bags: the way from a file to pixels."""

import re
import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from slidescale.engine.data.bag import draw_bag, epoch_order, epoch_size
from slidescale.engine.data.manifest import ManifestRow
from slidescale.engine.data.prefetch import TileReader, TileRequest
from slidescale.engine.data.slide import Slide, open_slide
from slidescale.engine.data.tiling import TileSpec, Tiling, cached_tiling, exact_corners, tile_slide
from slidescale.engine.errors import SlideError

from support.slides import stained, write_pyramid, write_tiff

SPEC = TileSpec(tile_px=224, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)
ROW = ManifestRow("s", "c", Path("s.svs"), (0.0,), "train")


def test_real_slide_reads_as_openslide_does(real_slide: Path) -> None:
    with open_slide(real_slide) as slide, openslide.OpenSlide(real_slide) as expected:
        assert (slide.width, slide.height) == (2220, 2967)
        assert slide.mpp_um == pytest.approx(0.499)
        ours = slide.read(480, 960, (224, 224), 0.499)
        theirs = np.asarray(expected.read_region((480, 960), 0, (224, 224)).convert("RGB"))
        np.testing.assert_array_equal(ours, theirs)


def test_real_slide_tiling(real_slide: Path) -> None:
    with open_slide(real_slide) as slide:
        tiling = tile_slide(slide, SPEC)
        assert tiling.side_px == pytest.approx(224 * 0.5 / 0.499)
        assert 40 <= len(tiling.coords) <= 50, "tissue covers four tenths of this slide, whose grid is 9 × 13"
        saturation = [np.ptp(slide.read(x, y, (32, 32), 3.5), axis=2).mean() for x, y in tiling.coords]
        assert min(saturation) > 10, "no tile is glass"
    assert len(np.unique(tiling.coords, axis=0)) == len(tiling.coords)


@pytest.mark.parametrize("mpp_um", [0.25, 0.31, 0.5])
def test_resolution_is_honoured(tmp_path: Path, mpp_um: float) -> None:
    """The same tissue scanned at 40x and at 20x gives the same tiles."""
    side_px = round(512 / mpp_um)
    path = write_tiff(tmp_path / "s.tif", stained(side_px, side_px), mpp_um)
    with open_slide(path) as slide:
        image = slide.read(0, 0, (1024, 1024), 0.5)
        tiling = tile_slide(slide, TileSpec(tile_px=64, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None))
    # Half a pixel of shift at the edge of the tissue, spread over the whole.
    assert np.abs(image.astype(int) - stained(1024, 1024)).mean() < 0.5
    column, row = (tiling.coords * mpp_um / 32).round().astype(int).T
    assert set(zip(row, column, strict=True)) == {(row, column) for row in range(4, 12) for column in range(4, 12)}


def test_pyramid_level_is_used(demo_manifest: Path) -> None:
    path = next((demo_manifest.parent / "slides").glob("*.svs"))
    with open_slide(path) as slide:
        coarse, fine = slide.read(0, 0, (256, 256), 2.0), slide.read(0, 0, (1024, 1024), 0.5)
    average = fine.reshape(256, 4, 256, 4, 3).mean((1, 3))
    # A level is a JPEG of its own; a read at the wrong scale or place differs by tens of grey levels.
    assert np.abs(coarse - average).mean() < 6
    assert np.abs(np.roll(coarse, 8, axis=1) - average).mean() > 10


def test_missing_resolution(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.tif", stained(512, 512), None)
    with pytest.raises(SlideError, match="--data.default-mpp-um"):
        open_slide(path)
    with open_slide(path, default_mpp_um=0.5) as slide:
        assert slide.mpp_um == 0.5


def test_too_coarse(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.tif", stained(512, 512), 1.0)
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"1 µm/px, coarser than the 0.5 µm/px wanted"):
        slide.read(0, 0, (64, 64), 0.5)


class ArrayFile:
    """A reader of another kind: levels in memory, whose places are in their own pixels."""

    steps = (1.0, 1.0)

    def __init__(self, levels: list[np.ndarray], **properties: str) -> None:
        self._levels = [np.pad(level, ((64, 64), (64, 64), (0, 0)), constant_values=255) for level in levels]
        self.sizes = [(level.shape[1], level.shape[0]) for level in levels]
        self.properties = {name.replace("_", "."): value for name, value in properties.items()}
        self.is_open = True

    def read(self, level: int, place: tuple[int, int], size_px: tuple[int, int]) -> Image.Image:
        (x, y), (width, height) = place, size_px
        return Image.fromarray(self._levels[level][y + 64 : y + 64 + height, x + 64 : x + 64 + width])

    def close(self) -> None:
        self.is_open = False


def test_another_reader_gives_the_same_slide(tmp_path: Path) -> None:
    """All of resolution, resampling, levels and tissue is the slide's, and none of it the reader's."""
    levels = [stained(1024, 768), stained(512, 384)]
    path = write_pyramid(tmp_path / "s.tif", levels, 0.4)
    centimetres = {"openslide_mpp-x": "0.4", "openslide_mpp-y": "0.4"}
    file = ArrayFile(levels, **centimetres)
    spec = TileSpec(tile_px=64, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)
    with open_slide(path) as expected, Slide(path, file) as slide:
        assert slide.bounds == expected.bounds and slide.mpp_um == pytest.approx(expected.mpp_um)
        np.testing.assert_array_equal(tile_slide(slide, spec).coords, tile_slide(expected, spec).coords)
        for mpp_um, corner in ((0.4, (100, 200)), (0.5, (100.3, 200.7)), (0.8, (64, 32)), (1.1, (90.2, 40.5))):
            ours, theirs = (each.read(*corner, (50, 60), mpp_um) for each in (slide, expected))
            assert np.abs(ours.astype(int) - theirs).max() <= 1, mpp_um
        assert file.is_open
    assert not file.is_open
    nameless = ArrayFile(levels)
    with pytest.raises(SlideError, match=r"s.tif: states no resolution"):
        Slide(path, nameless)
    assert not nameless.is_open


def test_one_file_imports_openslide() -> None:
    engine = Path(__file__).parent.parent / "engine"
    having = [
        path for path in engine.rglob("*.py") if re.search(r"^\s*(import|from) openslide\b", path.read_text(), re.M)
    ]
    assert having == [engine / "data" / "openslide.py"]


@pytest.mark.parametrize("noise", [0, 3])
def test_no_tissue(tmp_path: Path, noise: int) -> None:
    glass = np.full((1024, 1024, 3), 245, np.int16)
    glass = glass + np.random.default_rng(0).integers(-noise, noise + 1, glass.shape)
    path = write_tiff(tmp_path / "s.tif", glass.astype(np.uint8), 0.5)
    with open_slide(path) as slide, pytest.raises(SlideError, match="no tissue"):
        tile_slide(slide, SPEC)


def test_smaller_than_a_tile(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.tif", stained(300, 100), 0.5)
    with open_slide(path) as slide, pytest.raises(SlideError, match="smaller than one tile"):
        tile_slide(slide, SPEC)


def test_not_a_slide(tmp_path: Path) -> None:
    (tmp_path / "s.svs").write_bytes(b"not a slide")
    with pytest.raises(SlideError, match="cannot open"):
        open_slide(tmp_path / "s.svs")


def test_tiling_is_computed_once(real_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slidescale.engine.data import tiling as module

    calls = []
    original = module.tile_slide
    monkeypatch.setattr(module, "tile_slide", lambda *args: calls.append(1) or original(*args))
    first = cached_tiling(real_slide, SPEC, tmp_path)
    again = cached_tiling(real_slide, SPEC, tmp_path)
    np.testing.assert_array_equal(first.coords, again.coords)
    assert len(calls) == 1
    cached_tiling(real_slide, TileSpec(tile_px=256, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None), tmp_path)
    assert len(calls) == 2, "other settings are another tiling"
    for kept in tmp_path.glob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:50])
    np.testing.assert_array_equal(cached_tiling(real_slide, SPEC, tmp_path).coords, first.coords)


def test_bag_is_drawn_without_repeats() -> None:
    tiling = Tiling(np.stack(np.divmod(np.arange(100), 10), axis=1), 64.0)
    bag = draw_bag(ROW, tiling, 30, seed=0, epoch=0)
    assert bag.k == 30
    assert len(np.unique(bag.coords, axis=0)) == 30
    order = bag.coords[:, 0] * 10 + bag.coords[:, 1]
    assert (np.diff(order) > 0).all(), "in reading order"
    np.testing.assert_array_equal(bag.coords, draw_bag(ROW, tiling, 30, seed=0, epoch=0).coords)
    assert not np.array_equal(bag.coords, draw_bag(ROW, tiling, 30, seed=0, epoch=1).coords)
    assert not np.array_equal(bag.coords, draw_bag(ROW, tiling, 30, seed=1, epoch=0).coords)
    assert draw_bag(ROW, tiling, 101, seed=0, epoch=0).k == 100
    assert draw_bag(ROW, tiling, "all", seed=0, epoch=0).k == 100


def test_epoch_order() -> None:
    rows = [ManifestRow(str(i), str(i), Path("s"), (0.0,), "train") for i in range(20)]
    first = epoch_order(rows, seed=0, epoch=0)
    assert sorted(map(id, first)) == sorted(map(id, rows))
    assert first == epoch_order(rows, seed=0, epoch=0) != epoch_order(rows, seed=0, epoch=1)


def test_an_epoch_takes_a_share_of_the_slides() -> None:
    """The same on every rank, without repeats, others each time; in the end, all of them."""
    rows = [ManifestRow(str(i), str(i), Path("s"), 0, "train") for i in range(11)]
    epochs = [epoch_order(rows, seed=3, epoch=epoch, share=0.5) for epoch in range(12)]
    assert all(len({row.slide_id for row in epoch}) == len(epoch) == epoch_size(11, 0.5) == 6 for epoch in epochs)
    assert epochs[0] == epoch_order(rows, seed=3, epoch=0, share=0.5) != epochs[1]
    assert {row.slide_id for epoch in epochs for row in epoch} == {row.slide_id for row in rows}
    assert epoch_order(rows, seed=3, epoch=0, share=1.0) == epoch_order(rows, seed=3, epoch=0)
    assert [epoch_size(slides, 0.01) for slides in (0, 1, 30)] == [0, 1, 1], "at least one of what there is"


@pytest.fixture
def reader():
    reader = TileReader(SPEC, threads=2, pin=False)
    yield reader
    reader.close()


def test_reading_ahead_keeps_order_and_pixels(real_slide: Path, reader: TileReader) -> None:
    with open_slide(real_slide) as slide:
        coords = tile_slide(slide, SPEC).coords
        requests = [TileRequest(real_slide, coords[first : first + 5]) for first in range(0, 20, 5)]
        requests.insert(1, TileRequest(real_slide, coords[:0]))
        tiles = [reading.wait().numpy() for reading in reader.ahead(requests, depth=2)]
        assert [len(part) for part in tiles] == [5, 0, 5, 5, 5]
        corners = exact_corners(coords[:20], SPEC.side_px(slide))
        for tile, (x, y) in zip(np.concatenate(tiles), corners, strict=True):
            np.testing.assert_array_equal(tile, slide.read(x, y, (224, 224), 0.5))


def test_reading_ahead_begins_before_it_is_asked(real_slide: Path, reader: TileReader) -> None:
    asked = []

    def requests():
        for index in range(4):
            asked.append(index)
            yield TileRequest(real_slide, np.zeros((1, 2), np.int64))

    readings = reader.ahead(requests(), depth=1)
    next(readings)
    assert asked == [0, 1]


def test_damaged_slide_spares_the_others(real_slide: Path, reader: TileReader, tmp_path: Path) -> None:
    """OpenSlide's errors stick to the open file, so the file must be opened anew after one."""
    damaged = Path(shutil.copy(real_slide, tmp_path / "damaged.svs"))
    content = bytearray(damaged.read_bytes())
    content[20_000 : len(content) // 2] = bytes(len(content) // 2 - 20_000)
    damaged.write_bytes(content)
    coords = np.array([[480, 960], [0, 0]])
    requests = [TileRequest(path, coords) for path in (damaged, real_slide, damaged)]
    readings = list(reader.ahead(requests, depth=1))
    with pytest.raises(SlideError, match=r"damaged.svs: cannot read at"):
        readings[0].wait()
    assert readings[1].wait().shape == (2, 224, 224, 3)
    with pytest.raises(SlideError):
        readings[2].wait()
