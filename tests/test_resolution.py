"""Whose word is taken for a slide's resolution."""

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile

from slidescale.engine.config import DataConfig
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.data.manifest import read_files, read_manifest
from slidescale.engine.data.prefetch import TileReader, TileRequest
from slidescale.engine.data.resolution import resolution
from slidescale.engine.data.slide import open_slide
from slidescale.engine.data.tiling import TileSpec
from slidescale.engine.errors import ManifestError, SlideError
from slidescale.engine.parallel.rank_group import RankGroup

from support.slides import stained, write_tiff

SPEC = TileSpec(tile_px=64, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)


def stated(mpp_x: object, mpp_y: object | None = None, power: object | None = None) -> dict[str, str]:
    tags = {"openslide.mpp-x": mpp_x, "openslide.mpp-y": mpp_y or mpp_x, "openslide.objective-power": power}
    return {name: str(value) for name, value in tags.items() if value is not None}


@pytest.mark.parametrize(
    ("tags", "doubt"),
    [
        (stated(0.05, power=20), "unusual resolution (openslide.mpp-x 0.05, openslide.mpp-y 0.05)"),
        (stated(8), "unusual resolution (openslide.mpp-x 8"),
        (stated(0.25, power=20), "an objective of 20x (openslide.objective-power), with which about 0.5 µm/px"),
        (stated(0.5, power=40), "an objective of 40x"),
    ],
)
def test_an_unlikely_resolution_is_believed_and_doubted(tags: dict[str, str], doubt: str) -> None:
    found, doubts = resolution(tags, None, None)
    assert found == float(tags["openslide.mpp-x"])
    assert len(doubts) == 1
    assert doubt in doubts[0]
    assert "column mpp_um" in doubts[0]


@pytest.mark.parametrize(
    "tags", [stated(0.25, power=40), stated(0.499, 0.4995, power=20), stated(0.2, power=40), stated(0.5, power="x")]
)
def test_a_likely_one_is_not_doubted(tags: dict[str, str]) -> None:
    assert resolution(tags, None, None)[1] == []


@pytest.mark.parametrize("tags", [stated(v) for v in (0.0, "inf", "nan", -1, 352.78, "x")] + [stated(0.5, 0.25)])
def test_an_impossible_one_gives_way(tags: dict[str, str]) -> None:
    with pytest.raises(SlideError, match=r"impossible resolution \(openslide.mpp-x .*column mpp_um"):
        resolution(tags, None, None)
    found, doubts = resolution(tags, 0.5, None)
    assert found == 0.5
    assert len(doubts) == 1
    assert "0.5 µm/px is taken instead" in doubts[0]
    assert resolution(tags, 0.5, 0.25) == (0.25, [])


def test_a_persons_word_comes_first() -> None:
    assert resolution({}, 0.5, 0.25) == (0.25, [])
    assert resolution(stated(0.05, power=20), None, 0.5) == (0.5, [])


@pytest.fixture
def dots_per_inch(tmp_path: Path) -> Path:
    """A slide at 0.5 µm a pixel that an image program has saved with 72 dots per inch."""
    path = tmp_path / "dpi.tif"
    tifffile.imwrite(
        path,
        stained(1024, 1024),
        tile=(256, 256),
        photometric="rgb",
        compression="zlib",
        resolution=(72, 72),
        resolutionunit="INCH",
    )
    return path


def write_manifest(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_manifests_column_reaches_tiling_and_pixels(
    dots_per_inch: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiff(tmp_path / "fine.tif", stained(1024, 1000), 0.05)
    rows = [
        {"slide_id": "dpi", "case_id": "a", "path": "dpi.tif", "label": "x", "split": "train", "mpp_um": "0.5"},
        {"slide_id": "fine", "case_id": "b", "path": "fine.tif", "label": "y", "split": "train", "mpp_um": "0.25"},
    ]
    manifest_csv = write_manifest(tmp_path, rows)
    manifest = read_manifest(manifest_csv, DataConfig())
    assert [row.mpp_um for row in manifest.rows] == [0.5, 0.25]
    assert [file.mpp_um for file in read_files(manifest_csv, DataConfig())] == [0.5, 0.25]
    for again in range(2):  # found, and kept
        cohort = Cohort(manifest, RankGroup(), max_excluded=0, excluded_csv=tmp_path / "excluded.csv")
        cohort.tile(SPEC, tmp_path / "tilings", threads=1)
        assert [cohort.tilings[name].side_px for name in ("dpi", "fine")] == [64, 128], again
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    reader = TileReader(SPEC, threads=1, pin=False)
    try:
        for row in manifest.rows:
            coords = cohort.tilings[row.slide_id].coords[:3]
            (reading,) = reader.ahead([TileRequest(row.path, coords, row.mpp_um)], 0)
            with open_slide(row.path, mpp_um=row.mpp_um) as slide:
                expected = [slide.read(x, y, (64, 64), 0.5) for x, y in coords.tolist()]
            np.testing.assert_array_equal(reading.wait().numpy(), expected)
    finally:
        reader.close()


def test_doubts_are_said_once_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the tiling was kept, and whichever rank has opened the slide."""
    write_tiff(tmp_path / "odd.tif", stained(2048, 2048), 0.05)
    row = {"slide_id": "odd", "case_id": "a", "path": "odd.tif", "label": "x", "split": "train", "mpp_um": ""}
    other = row | {"slide_id": "b", "case_id": "b", "path": "b.tif", "label": "y", "mpp_um": "0.5"}
    write_tiff(tmp_path / "b.tif", stained(1024, 1024), 0.05)
    manifest = read_manifest(write_manifest(tmp_path, [row, other]), DataConfig())
    spec = TileSpec(tile_px=16, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)
    for _ in range(2):
        caplog.clear()
        cohort = Cohort(manifest, RankGroup(), max_excluded=0, excluded_csv=tmp_path / "excluded.csv")
        cohort.tile(spec, tmp_path / "tilings", threads=1)
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert "odd.tif: states an unusual resolution" in warnings[0]


@pytest.mark.parametrize("cell", ["0", "-1", "inf", "0,5", "40x", "353"])
def test_a_cell_that_is_no_resolution(tmp_path: Path, cell: str) -> None:
    write_tiff(tmp_path / "a.tif", stained(64, 64), 0.5)
    row = {"slide_id": "a", "case_id": "a", "path": "a.tif", "label": "x", "split": "train", "um": cell}
    path = write_manifest(tmp_path, [row])
    with pytest.raises(ManifestError, match=rf"row 2: um '{cell}' must be the slide's µm per pixel"):
        read_manifest(path, DataConfig(mpp_column="um"))
    with pytest.raises(ManifestError, match="row 2: um"):
        read_files(path, DataConfig(mpp_column="um"))


def test_a_file_that_is_there_and_one_that_is_not(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(stained(64, 64)).save(tmp_path / "flat.png")
    with pytest.raises(
        SlideError, match=r"flat.png: it is not of a kind that OpenSlide reads \(Aperio SVS, .*tiled TIFF"
    ):
        open_slide(tmp_path / "flat.png")
    with pytest.raises(SlideError, match=r"none.svs: no such file"):
        open_slide(tmp_path / "none.svs")
