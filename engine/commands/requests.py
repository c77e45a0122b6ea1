"""What the commands on a trained run are asked, as their command lines say it; imported without PyTorch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from slidescale.engine.checks import RESOLUTION, SHARE_ABOVE_0, at_least, check, either
from slidescale.engine.config import ATTENTION_PX
from slidescale.engine.errors import ConfigError

# Arithmetic of matrix products.
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """How a trained model is run."""

    weights: Path | None = None
    """Weights of the encoder of a frozen run, if they are no longer where the settings of the run say. They must be the
    same weights."""
    precision: Precision = "fp32"
    """Arithmetic of matrix products. fp32: the probability of a slide does not depend on ranks or chunks (to 1e-5).
    bf16: faster, as in training and its predictions.csv where the processor or GPU has it, and rounds to 1 part in 256
    at each layer, differently for each way of cutting a slide."""
    chunk: int | None = None
    """Tiles that go through the encoder at once; by default 128 on a GPU, 16 on a CPU."""
    readers: int = 2
    """Threads per rank that read tiles."""
    default_mpp_um: float | None = None
    """Level-0 resolution, in µm per pixel, assumed for slides whose file states none, or an impossible one; by default
    as in the run."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        rules = {
            "chunk": either(None, at_least(1, "tile")),
            "readers": at_least(1, "thread"),
            "default_mpp_um": either(None, RESOLUTION),
        }
        check(self, rules)


@dataclass(frozen=True, kw_only=True)
class PredictRequest(ComputeSettings):
    """Predict slides with the best epoch of a trained run.

    Under torchrun or deepspeed, ranks share the tiles of each slide. If a slide cannot be predicted, the command names
    it, predicts the rest, and fails at the end.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/egfr."""
    slides: tuple[Path, ...] = ()
    """Slide files. The name of a slide is that of its file, without the ending."""
    manifest: Path | None = None
    """CSV with one row per slide instead: slide_id and path (columns named as in the manifest of the run), relative to
    its folder, and mpp_um where a file states no resolution or a wrong one. If it has the label columns of the run, too
    (and case_id, for intervals over patients), metrics and figures of the labelled slides are written beside --out."""
    out: Path = Path("predictions.csv")
    """CSV to write, anew after each slide: slide_id, path, the prediction (for classes: the probability of the second
    of two, or of each of more) and k, the number of tiles."""
    heatmaps: Path | None = None
    """Folder for the attention of each slide, as `slidescale heatmap` writes it."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        super().__post_init__()
        if bool(self.slides) == (self.manifest is not None):
            raise ConfigError("name the slides, either by --slides or by --manifest")


@dataclass(frozen=True, kw_only=True)
class HeatmapRequest(ComputeSettings):
    """Write the attention over a slide: a picture, a TIFF pyramid, and GeoJSON for QuPath.

    Each tile has its share of the attention of the slide (all shares add up to 1), its fold (its share over that of the
    mean tile) and its percentile.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/egfr."""
    slide: Path
    """Slide file."""
    mpp_um: float | None = None
    """Level-0 resolution of the slide, in µm per pixel, if its file states none or a wrong one."""
    out: Path = Path("heatmaps")
    """Folder to write <slide>_attention.png, .tif and .geojson to."""
    max_px: int = ATTENTION_PX
    """Longer side of each half of the picture, in pixels."""
    top: float = 1.0
    """Share of the tiles that the GeoJSON has, the most attended ones; above 0, at most 1. 20,000 tiles take 10 MB in
    it. The other files always have all tiles."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        super().__post_init__()
        check(self, {"max_px": at_least(64, "pixels"), "mpp_um": either(None, RESOLUTION), "top": SHARE_ABOVE_0})


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Write the encoder of the best epoch of a run for timm: weights, and a JSON file that says how to load them.

    Adapters (--model.lora-rank) are merged into the weights.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/egfr."""
    out: Path = Path("encoder.safetensors")
    """File to write. The description goes to the same name with .json."""
    weights: Path | None = None
    """Weights of the encoder of a frozen run, if they are no longer where the settings of the run say. They must be the
    same weights."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if self.out.suffix != ".safetensors":
            raise ConfigError(f"--out is {self.out}: must end in .safetensors, by which timm knows the format")
