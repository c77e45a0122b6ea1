"""The demo cohort: readable as Aperio slides, reproducible to the byte, and no class in the averages."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import openslide
import pytest

from slidescale.engine.data.synthetic import draw_slide, write_demo_cohort

SLIDES = 6
BLANK_ABOVE = 225
"""Grey levels: glass is drawn at about 242, stained tissue below 215 in green."""


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    return write_demo_cohort(tmp_path_factory.mktemp("cohort"), slides=SLIDES, seed=3, workers=2)


@pytest.fixture(scope="session")
def slide(manifest) -> openslide.OpenSlide:
    with openslide.OpenSlide(manifest.parent / "slides" / "slide-000.svs") as opened:
        yield opened


@pytest.fixture(scope="session")
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """The same six pictures drawn as either class: uint8 [height, width, 3], benign first."""
    draws = [
        [draw_slide(np.random.default_rng((7, index)), atypical=kind) for kind in (False, True)] for index in range(6)
    ]
    return [tuple(pair) for pair in draws]


def read_rows(manifest: Path) -> list[dict[str, str]]:
    with open(manifest, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by its relative path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def pixels(slide: openslide.OpenSlide, level: int) -> np.ndarray:
    """A whole level as OpenSlide decodes it, uint8 [height, width, 3]."""
    return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))


def test_openslide_reads_an_aperio_pyramid(slide):
    assert slide.properties["openslide.vendor"] == "aperio"
    assert float(slide.properties["openslide.mpp-x"]) == float(slide.properties["openslide.mpp-y"]) == 0.5
    assert slide.properties["openslide.objective-power"] == "20"
    # A last row or column that does not fill a square of 16 px is left out, hence not exactly 4 and 16.
    assert slide.level_downsamples == pytest.approx((1, 4, 16), rel=0.01)
    assert all(1600 <= side <= 2000 for side in slide.dimensions)
    assert slide.properties["openslide.level[0].tile-width"] == "256"
    assert "thumbnail" in slide.associated_images


def test_decoded_pixels_are_those_drawn(slide):
    rows = read_rows(Path(slide._filename).parent.parent / "manifest.csv")
    drawn = draw_slide(np.random.default_rng((3, 0)), atypical=rows[0]["label"] == "mutant").astype(int)
    decoded = pixels(slide, 0).astype(int)
    # JPEG at quality 80 moves a pixel by 2 to 3 grey levels; a wrong colour space moves it by 50.
    assert np.abs(decoded - drawn).mean() < 4
    assert np.abs(decoded - drawn[:, :, ::-1]).mean() > 8, "the bound would not notice swapped channels"


def test_glass_is_white_and_tissue_is_pink(slide):
    image = pixels(slide, 1)
    assert image[:8].mean() > 235 and image[:8].std() < 5
    red, green, blue = image[image[..., 1] < 215].mean(0)
    assert red > blue > green
    assert red - green > 30


def test_only_the_foci_differ_between_the_classes(pairs):
    for benign, atypical in pairs:
        assert benign.shape == atypical.shape
        changed = (benign != atypical).any(-1)
        tissue = benign[..., 1] < BLANK_ABOVE
        assert 0.02 < changed[tissue].mean() < 0.06


def test_class_is_not_in_the_averages(pairs):
    """Mean colour, tissue area, share of dark pixels and compressed size differ by less than slides do.

    The bound is on the difference between classes of the *same* picture, over the spread between pictures
    of one class: at a quarter of a standard deviation one number separates the classes with an AUROC of 0.57
    at most, and the median picture of 12 would still be told wrongly.
    """
    summaries = np.array([[summary(image) for image in pair] for pair in pairs])
    spread = summaries[:, 0].std(axis=0, ddof=1)
    difference = np.abs((summaries[:, 1] - summaries[:, 0]).mean(axis=0))
    assert (spread > 0).all()
    assert (difference < 0.25 * spread).all(), difference / spread


def summary(image: np.ndarray) -> tuple[float, ...]:
    """Mean red, green and blue, tissue pixels, share of pixels as dark as a nucleus."""
    return *image.mean((0, 1)), (image[..., 1] < BLANK_ABOVE).sum(), (image[..., 0] < 150).mean()
