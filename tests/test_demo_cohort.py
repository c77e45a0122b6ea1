"""The demo cohort: readable as Aperio slides, reproducible to the byte, and no class in the averages."""

import csv
import hashlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from slidescale.engine.data.demo_cohort import _plan_cohort, write_demo_cohort
from slidescale.engine.data.demo_drawing import draw_slide

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


@pytest.fixture(scope="session", params=["large", "small"])
def pairs(request) -> list[tuple[np.ndarray, np.ndarray]]:
    """Twelve slides, six pictures each drawn as either class: uint8 [height, width, 3], benign first."""

    def draw(index: int, atypical: bool) -> np.ndarray:
        return draw_slide(np.random.default_rng((7, index)), atypical=atypical, foci=request.param)

    return [(draw(index, False), draw(index, True)) for index in range(6)]


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


def test_decoded_pixels_are_those_drawn(manifest, slide):
    atypical = read_rows(manifest)[0]["label"] == "mutant"
    drawn = draw_slide(np.random.default_rng((3, 0)), atypical=atypical).astype(int)
    decoded = pixels(slide, 0).astype(int)
    # JPEG at quality 80 moves a pixel by 2 to 3 grey levels; a wrong colour space moves it by 50.
    assert np.abs(decoded - drawn).mean() < 4
    assert np.abs(decoded - drawn[:, :, ::-1]).mean() > 8, "the bound would not notice swapped channels"


def test_the_pictures_stay_what_they_are():
    """Recorded: published figures are of these slides. To a hundredth, since processors round exponentials apart."""
    image = draw_slide(np.random.default_rng((3, 1)), atypical=True, foci="small")
    assert image.shape == (1992, 1701, 3)
    assert image.mean((0, 1)) == pytest.approx([218.597, 200.135, 208.567], abs=0.01)
    assert image.std((0, 1)) == pytest.approx([38.241, 57.908, 42.186], abs=0.01)


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
        assert 0.02 < changed[tissue].mean() < 0.07


def summary(image: np.ndarray) -> tuple[float, ...]:
    """Mean red, green and blue, tissue pixels, share of pixels as dark as a nucleus, bytes as a JPEG."""
    encoded = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(encoded, "JPEG", quality=80)
    tissue, dark = (image[..., 1] < BLANK_ABOVE).sum(), (image[..., 0] < 150).mean()
    return *image.mean((0, 1)), tissue, dark, encoded.tell()


def test_class_is_not_in_the_averages(pairs):
    """Colour, tissue area, nuclear pixels and compressed size differ less between classes than within one.

    The difference is taken between two drawings of one picture, so chance does not enter it. A number whose
    class means lie a quarter of a standard deviation apart has an AUROC of Φ(0.25 / √2) = 0.57.
    """
    summaries = np.array([[summary(image) for image in pair] for pair in pairs])
    spread = summaries[:, 0].std(axis=0, ddof=1)
    assert (spread > 0).all()
    difference = np.abs((summaries[:, 1] - summaries[:, 0]).mean(axis=0))
    assert (difference < 0.25 * spread).all(), difference / spread
    # The bound can fail: a stain a tenth stronger in one class is far outside it.
    stronger = np.array([summary(255 * (image / 255) ** 1.1) for image, _ in pairs])
    assert (np.abs((stronger - summaries[:, 0]).mean(axis=0))[:3] > 0.25 * spread[:3]).all()


def test_manifest_rows_lead_to_slides(manifest):
    rows = read_rows(manifest)
    assert list(rows[0]) == ["slide_id", "case_id", "path", "label", "split"]
    assert len(rows) == SLIDES == len({row["slide_id"] for row in rows})
    for row in rows:
        assert not Path(row["path"]).is_absolute()
        assert (manifest.parent / row["path"]).is_file()
    assert not list(manifest.parent.rglob(".unfinished-*"))


@pytest.mark.parametrize("slides", [4, 7, 24, 64])
def test_plan_is_balanced_and_keeps_cases_together(slides):
    plans = _plan_cohort(slides, 0, ("wild_type", "mutant"), "large")
    counts = Counter((plan.split, plan.label) for plan in plans)
    assert counts.total() == slides and len(counts) == 4
    for split in ("train", "val"):
        assert abs(counts[split, "wild_type"] - counts[split, "mutant"]) <= 1
    cases = {(plan.case_id, plan.split, plan.label) for plan in plans}
    assert len(cases) == len({plan.case_id for plan in plans}), "a case has two splits or two labels"
    if slides == 64:
        assert counts["train", "mutant"] == 20 and counts["val", "mutant"] == 12
        assert max(Counter(plan.case_id for plan in plans).values()) == 2


def test_same_bytes_again_and_with_other_workers(manifest, tmp_path):
    again = write_demo_cohort(tmp_path, slides=SLIDES, seed=3, workers=1)
    assert digests(again.parent) == digests(manifest.parent)
    assert len(set(digests(tmp_path / "slides").values())) == SLIDES, "two slides are the same picture"


def test_complete_cohort_is_left_alone_and_an_interrupted_one_completed(manifest, tmp_path):
    folder = tmp_path / "cohort"
    shutil.copytree(manifest.parent, folder)
    complete = digests(folder)
    touched = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    write_demo_cohort(folder, slides=SLIDES, seed=3)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == touched

    # As a killed run leaves it: no stamp, no manifest, a slide missing and another half written.
    for name in ("cohort.json", "manifest.csv", "slides/slide-001.svs"):
        (folder / name).unlink()
    write_demo_cohort(folder, slides=SLIDES, seed=3)
    assert digests(folder) == complete


def test_other_parameters_draw_again(manifest, tmp_path):
    folder = tmp_path / "cohort"
    shutil.copytree(manifest.parent, folder)
    write_demo_cohort(folder, slides=4, seed=4)
    assert json.loads((folder / "cohort.json").read_text())["seed"] == 4
    assert len(read_rows(folder / "manifest.csv")) == 4
    assert digests(folder)["slides/slide-000.svs"] != digests(manifest.parent)["slides/slide-000.svs"]


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="slides 3"):
        write_demo_cohort(tmp_path, slides=3)
    with pytest.raises(ValueError, match="different names"):
        write_demo_cohort(tmp_path, classes=("a", "a"))
