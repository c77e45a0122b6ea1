"""A slide's attention as viewers take it: GeoJSON by its standard, a TIFF that lies where the slide does, a legend."""

import json
import math
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import geojson
import numpy as np
import openslide
import pytest
import tifffile
import torch
from PIL import Image

from slidescale.engine.commands.heatmap import HeatmapRequest, draw_heatmap
from slidescale.engine.commands.predict import ComputeSettings, Predictor, SlidePrediction
from slidescale.engine.commands.trained import load_run
from slidescale.engine.data.manifest import NamedFile
from slidescale.engine.data.slide import open_slide
from slidescale.engine.data.tiling import TileSpec, Tiling, tile_slide
from slidescale.engine.errors import ConfigError, SlideError, UserError
from slidescale.engine.evaluation.attention import PX_A_TILE, attention_geojson, write_attention
from slidescale.engine.evaluation.attention_picture import (
    attention_colours,
    attention_opacity,
    attention_overlay,
    with_legend,
)
from slidescale.engine.parallel.mesh import Mesh

from support.runs import write_run

# 224 px at 0.523 µm/px of a slide of 0.499: a tile's side is not a whole number of its pixels.
SPEC = TileSpec(tile_px=56, mpp_um=0.523, min_tissue=0.5, default_mpp_um=None)


@pytest.fixture(scope="module")
def written(real_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiling, np.ndarray]:
    """The folder of the real slide's files, its tiling, and weights that span all colours."""
    folder = tmp_path_factory.mktemp("attention")
    with open_slide(real_slide) as slide:
        tiling = tile_slide(slide, SPEC)
        weights = np.exp(np.random.default_rng(0).normal(0, 2, len(tiling.coords)))
        weights /= weights.sum()
        write_attention(folder, "real", slide, tiling, weights, model="a model", says="p 0.5", max_px=500)
    assert tiling.side_px % 1 > 0.1, "or rounding goes untested"
    return folder, tiling, weights


def features_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "real_attention.geojson").read_text())["features"]


def signed_area(ring: list[list[float]]) -> float:
    """Positive where a ring is counterclockwise, with y upwards (the shoelace formula)."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) / 2


def faults_of(feature: dict[str, Any]) -> list[str]:
    """What RFC 7946 or QuPath would not have."""
    faults = list(geojson.loads(json.dumps(feature)).errors() or [])
    (ring,) = feature["geometry"]["coordinates"]
    if ring[0] != ring[-1] or len(ring) != 5:
        faults.append("not a closed square")
    if signed_area(ring) <= 0:
        faults.append("clockwise")
    properties = feature["properties"]
    if properties["objectType"] != "detection":
        faults.append("no detection")
    if set(properties["classification"]) != {"name", "color"} or len(properties["classification"]["color"]) != 3:
        faults.append("no class")
    if not all(type(value) is float and math.isfinite(value) for value in properties["measurements"].values()):
        faults.append("a measurement is no number")
    return faults


def test_geojson_is_valid(written: tuple[Path, Tiling, np.ndarray]) -> None:
    folder, tiling, _ = written
    collection = geojson.loads((folder / "real_attention.geojson").read_text())
    assert collection.is_valid, collection.errors()
    features = features_of(folder)
    assert len(features) == len(tiling.coords) > 500
    assert [fault for feature in features for fault in faults_of(feature)] == []
    ids = [uuid.UUID(feature["id"]) for feature in features]
    assert len(set(ids)) == len(ids)
    used = {feature["properties"]["classification"]["name"] for feature in features}
    assert len(used) == 6
    turned = json.loads(json.dumps(features[0]))
    turned["geometry"]["coordinates"][0].reverse()
    assert faults_of(turned) == ["clockwise"], "the check can fail"


def test_geojson_squares_are_the_tiles(written: tuple[Path, Tiling, np.ndarray], real_slide: Path) -> None:
    """Where tiles are, and without gaps or overlaps between neighbours."""
    folder, tiling, _ = written
    squares = {}
    for feature, coords in zip(features_of(folder), tiling.coords, strict=True):
        ring = np.array(feature["geometry"]["coordinates"][0])
        (x0, y0), (x1, y1) = ring.min(axis=0), ring.max(axis=0)
        assert [x0, y0] == list(coords)
        assert max(abs(x1 - x0 - tiling.side_px), abs(y1 - y0 - tiling.side_px)) <= 1
        squares[tuple(coords.tolist())] = (x1, y1)
    corners = set(squares)
    beside = [(x1, key[1]) in corners for key, (x1, _) in squares.items()]
    right = {(column + 1, row) for column, row in tiling.cells.tolist()} & set(map(tuple, tiling.cells.tolist()))
    assert sum(beside) == len(right) > 100
    with open_slide(real_slide) as slide:
        assert max(x for x, _ in squares.values()) <= slide.width
        assert max(y for _, y in squares.values()) <= slide.height


def test_geojson_measurements(written: tuple[Path, Tiling, np.ndarray]) -> None:
    folder, _, weights = written
    found = {name: [] for name in ("Attention share", "Attention fold", "Attention percentile")}
    for feature in features_of(folder):
        for name, value in feature["properties"]["measurements"].items():
            found[name].append(value)
    np.testing.assert_allclose(found["Attention share"], weights, rtol=1e-5)  # six digits are written
    assert sum(found["Attention share"]) == pytest.approx(1, abs=1e-4)
    assert np.mean(found["Attention fold"]) == pytest.approx(1, abs=1e-4)
    assert max(found["Attention percentile"]) == 100
    assert np.argmax(found["Attention percentile"]) == np.argmax(weights)
    by_fold = sorted(zip(found["Attention fold"], features_of(folder), strict=True), key=lambda pair: pair[0])
    assert by_fold[0][1]["properties"]["classification"]["name"] == "Attention < 0.25 x mean"
    assert by_fold[-1][1]["properties"]["classification"]["name"] == "Attention >= 4 x mean"


def test_geojson_of_the_most_attended(written: tuple[Path, Tiling, np.ndarray]) -> None:
    folder, tiling, weights = written
    most = attention_geojson(tiling, weights, source="a model real", top=0.1)["features"]
    assert len(most) == math.ceil(0.1 * len(weights))
    least = min(feature["properties"]["measurements"]["Attention share"] for feature in most)
    assert (weights > least * 1.00001).sum() < len(most)
    everything = {feature["id"]: feature for feature in features_of(folder)}
    assert all(everything[feature["id"]] == feature for feature in most), "the same ids, among all tiles' percentiles"
    other = attention_geojson(tiling, weights, source="another model real", top=0.1)["features"]
    assert not {feature["id"] for feature in other} & set(everything)


def test_geojson_of_a_whole_slide_is_of_sensible_size() -> None:
    side = 447.3
    cells = np.stack(np.meshgrid(np.arange(160), np.arange(125)), axis=-1).reshape(-1, 2)
    tiling = Tiling(np.rint(cells * side).astype(np.int64), side)
    weights = np.random.default_rng(0).dirichlet(np.ones(len(cells)))
    text = json.dumps(attention_geojson(tiling, weights, source="m"), separators=(",", ":"))
    assert len(cells) == 20_000
    assert len(text) < 12e6


def test_tiff_lies_where_the_slide_does(written: tuple[Path, Tiling, np.ndarray], real_slide: Path) -> None:
    folder, tiling, weights = written
    colours = np.rint(attention_colours(weights)).astype(np.uint8)
    with openslide.OpenSlide(folder / "real_attention.tif") as tiff, open_slide(real_slide) as slide:
        assert tiff.properties["openslide.vendor"] == "generic-tiff"
        scale = tiling.side_px / PX_A_TILE
        for axis in "xy":
            # TIFF writes resolutions as fractions of 32-bit numbers.
            assert float(tiff.properties[f"openslide.mpp-{axis}"]) == pytest.approx(slide.mpp_um * scale, rel=1e-5)
        width, height = tiff.dimensions
        assert 0 <= width * scale - slide.width < scale
        assert 0 <= height * scale - slide.height < scale
        assert tiff.level_count == 1 + math.ceil(math.log2(max(width, height) / 256)) >= 3
        for level, downsample in enumerate(tiff.level_downsamples):
            assert downsample == pytest.approx(2**level, rel=0.02)  # sizes are rounded up to whole pixels
        plain = np.asarray(tiff.read_region((0, 0), 0, tiff.dimensions).convert("RGB"))
        for index in range(0, len(weights), 37):
            # The pixel in which the middle of the tile lies, by the two files' µm a pixel alone.
            x, y = ((tiling.coords[index] + tiling.side_px / 2) / scale).astype(int)
            np.testing.assert_array_equal(plain[y, x], colours[index])
        second = np.asarray(tiff.read_region((0, 0), 1, tiff.level_dimensions[1]).convert("RGB"))
        x, y = ((tiling.coords[37] + tiling.side_px / 2) / scale / 2).astype(int)
        np.testing.assert_array_equal(second[y, x], colours[37])
        assert (plain == 255).all(axis=2).mean() == pytest.approx(1 - len(weights) * 256 / plain[..., 0].size, abs=1e-6)
    assert (folder / "real_attention.tif").stat().st_size < 200_000


LEICA = """<?xml version="1.0"?>
<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
<collection name="c" uuid="urn:uuid:0" sizeX="{slide_nm_x}" sizeY="{slide_nm_y}">
<image name="label" uuid="urn:uuid:1"><creationDate>2020-01-01T00:00:00Z</creationDate>
<device model="Leica SCN400" version="1"/>
<pixels sizeX="{macro_x}" sizeY="{macro_y}"><dimension sizeX="{macro_x}" sizeY="{macro_y}" r="0" ifd="0"/></pixels>
<view sizeX="{slide_nm_x}" sizeY="{slide_nm_y}" offsetX="0" offsetY="0" spacingZ="1000"/>
<scanSettings><objectiveSettings><objective>1</objective></objectiveSettings>
<illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>
<image name="main" uuid="urn:uuid:2"><creationDate>2020-01-01T00:00:00Z</creationDate>
<device model="Leica SCN400" version="1"/>
<pixels sizeX="{x}" sizeY="{y}"><dimension sizeX="{x}" sizeY="{y}" r="0" ifd="1"/></pixels>
<view sizeX="{nm_x}" sizeY="{nm_y}" offsetX="{offset_nm_x}" offsetY="{offset_nm_y}" spacingZ="1000"/>
<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>
<illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>
</collection></scn>"""


def write_leica(path: Path, image: np.ndarray, offset: tuple[int, int], mpp_um: float) -> Path:
    """A Leica SCN, whose picture lies at `offset` (x, y), in its pixels, on a plane four times as wide and high."""
    height, width = image.shape[:2]
    nm = 1000 * mpp_um
    macro = np.full((128, 128, 3), 255, np.uint8)
    about = LEICA.format(
        slide_nm_x=round(4 * width * nm),
        slide_nm_y=round(4 * height * nm),
        macro_x=128,
        macro_y=128,
        x=width,
        y=height,
        nm_x=round(width * nm),
        nm_y=round(height * nm),
        offset_nm_x=round(offset[0] * nm),
        offset_nm_y=round(offset[1] * nm),
    )
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for picture in (macro, image):
            file.write(
                picture,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                metadata=None,
                description=about if picture is macro else None,
                resolution=(1e4 / mpp_um,) * 2,
                resolutionunit="CENTIMETER",
                software=False,
            )
    return path


def test_files_lie_within_the_slides_bounds(real_slide: Path, tmp_path: Path) -> None:
    """To which QuPath crops it: tile for tile where the same picture has them on a plane of its own."""
    with openslide.OpenSlide(real_slide) as file:
        image = np.asarray(file.read_region((400, 800), 0, (1024, 1280)).convert("RGB"))
    # Whole tiles away, so that both have the same grid.
    spec = TileSpec(tile_px=64, mpp_um=0.5, min_tissue=0.5, default_mpp_um=None)
    offset = (64 * 9, 64 * 14)
    path = write_leica(tmp_path / "bounded.scn", image, offset, 0.5)
    with open_slide(path) as slide:
        assert (slide.width, slide.height) == (4 * 1024, 4 * 1280)
        assert tuple(slide.bounds) == (*offset, 1024, 1280)
        tiling = tile_slide(slide, spec)
        assert (tiling.coords >= offset).all()
        weights = np.random.default_rng(0).dirichlet(np.ones(len(tiling.coords)))
        write_attention(tmp_path, "real", slide, tiling, weights, model="m", says="p 0.5", max_px=300)
        mpp_um = slide.mpp_um
    corners = [np.array(each["geometry"]["coordinates"][0]).min(axis=0) for each in features_of(tmp_path)]
    np.testing.assert_array_equal(corners, tiling.coords - offset)
    assert (np.array(corners) < (1024, 1280)).all()
    colours = np.rint(attention_colours(weights)).astype(np.uint8)
    with openslide.OpenSlide(tmp_path / "real_attention.tif") as tiff:
        scale = float(tiff.properties["openslide.mpp-x"]) / mpp_um
        assert scale == pytest.approx(tiling.side_px / PX_A_TILE, rel=1e-5)
        assert tiff.dimensions == (1024 // 4, 1280 // 4)
        plain = np.asarray(tiff.read_region((0, 0), 0, tiff.dimensions).convert("RGB"))
    for (x, y), colour in zip(np.array(corners), colours, strict=True):
        np.testing.assert_array_equal(plain[int((y + 32) / scale), int((x + 32) / scale)], colour)
    with open_slide(real_slide) as slide:
        assert tuple(slide.bounds) == (0, 0, slide.width, slide.height), "a file without bounds"


def test_picture_has_a_legend(written: tuple[Path, Tiling, np.ndarray]) -> None:
    folder, _, _ = written
    picture = np.asarray(Image.open(folder / "real_attention.png"))
    below = picture[500:]
    folds = np.array([1.001, 8]) / 2  # of two tiles
    opacity = attention_opacity(folds)[:, None]
    for colour in opacity * attention_colours(folds) + (1 - opacity) * 255:
        assert (np.abs(below - colour).max(axis=2) <= 1).sum() > 10
    assert len(np.unique(below.reshape(-1, 3), axis=0)) > 100, "a bar of many colours"
    narrow = with_legend(np.zeros((10, 20, 3), np.uint8), "x" * 1000)
    assert narrow.shape[1] > 400


def test_overlay_has_no_seams() -> None:
    """Tiles of equal attention colour a plain slide uniformly, at any scale; those of the mean and less not at all."""

    class Plain:
        width = height = 5000

        def overview(self, max_px: int) -> np.ndarray:
            return np.full((max_px, max_px, 3), 200, np.uint8)

    side = 447.3
    cells = np.stack(np.meshgrid(np.arange(11), np.arange(11)), axis=-1).reshape(-1, 2)
    tiling = Tiling(np.rint(cells * side).astype(np.int64), side)
    weights = np.where(cells[:, 0] < 5, 1.8, 0.2)
    for max_px in (97, 331, 640):
        both = attention_overlay(Plain(), tiling, weights / weights.sum(), max_px=max_px)  # type: ignore[arg-type]
        height, width = int(11 * side * max_px / 5000), int(5 * side * max_px / 5000)
        covered = both[:height, max_px : max_px + width]
        assert len(np.unique(covered.reshape(-1, 3), axis=0)) == 1 and covered[0, 0].tolist() != [200, 200, 200]
        assert (both[:, max_px + width + 2 :] == 200).all()
        even = attention_overlay(Plain(), tiling, np.full(121, 1 / 121), max_px=max_px)  # type: ignore[arg-type]
        assert (even == 200).all()


def test_command(real_slide: Path, tmp_path: Path) -> None:
    """What is written are the weights of the prediction, by slide and model."""
    folder = write_run(tmp_path / "r")
    draw_heatmap(HeatmapRequest(run=folder, slide=real_slide, out=tmp_path / "maps", max_px=300, top=0.05))
    run = load_run(folder, torch.device("cpu"))
    predictor = Predictor(run, ComputeSettings(), Mesh(), torch.device("cpu"))
    (answer,) = predictor.predict([NamedFile("s", real_slide)])
    assert isinstance(answer, SlidePrediction)
    features = json.loads((tmp_path / "maps" / f"{real_slide.stem}_attention.geojson").read_text())["features"]
    shares = sorted(feature["properties"]["measurements"]["Attention share"] for feature in features)
    np.testing.assert_allclose(shares, np.sort(answer.weights)[-len(shares) :], rtol=1e-4)
    assert len(shares) == math.ceil(0.05 * len(answer.weights))
    assert not list((tmp_path / "maps").glob("*.unfinished"))


def test_a_slide_that_is_none_and_a_folder_that_is_none(real_slide: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    with pytest.raises(SlideError, match="cannot open"):
        draw_heatmap(HeatmapRequest(run=folder, slide=folder / "config.json", out=tmp_path / "maps"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*/file"):
        draw_heatmap(HeatmapRequest(run=folder, slide=real_slide, out=tmp_path / "file"))
    for settings, message in (
        ({"mpp_um": 0.0}, "--mpp-um is 0"),
        ({"top": 0.0}, "--top is 0"),
        ({"max_px": 3}, "--max-px is 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            HeatmapRequest(run=folder, slide=real_slide, **settings)  # type: ignore[arg-type]
