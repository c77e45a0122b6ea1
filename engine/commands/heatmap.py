"""`slidescale heatmap`: where a trained run looks on a slide."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import tyro

from slidescale.engine.commands.predict import ComputeSettings, Failure, attention_of, start_predictor
from slidescale.engine.data.manifest import NamedFile
from slidescale.engine.errors import ConfigError, SlideError, UserError
from slidescale.engine.evaluation.attention import MAX_PX, write_attention

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HeatmapRequest(ComputeSettings):
    """Write a slide's attention: a picture, a TIFF pyramid and GeoJSON for QuPath.

    Each tile has its share of the slide's attention (all add up to 1), its fold (1: the mean tile) and its percentile.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, such as runs/egfr."""
    slide: Path
    """Slide file."""
    mpp_um: float | None = None
    """Level-0 resolution of the slide, in µm per pixel, where the one that its file states is wrong."""
    out: Path = Path("heatmaps")
    """Folder to write <slide>_attention.png, .tif and .geojson to."""
    max_px: int = MAX_PX
    """Longer side of each of the picture's two halves."""
    top: float = 1.0
    """Share of the tiles, the most attended, that the GeoJSON has, above 0, at most 1. A slide of 20,000 tiles takes
    10 MB in it; the other files always have all tiles."""

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        super().__post_init__()
        if self.max_px < 64:
            raise ConfigError(f"--max-px is {self.max_px}: must be at least 64 pixels")
        if self.mpp_um is not None and not 0 < self.mpp_um < math.inf:
            raise ConfigError(f"--mpp-um is {self.mpp_um}: must be a positive number of µm per pixel")
        if not 0 < self.top <= 1:
            raise ConfigError(f"--top is {self.top:g}: must be a share above 0, at most 1")


def draw_heatmap(request: HeatmapRequest) -> None:
    """Predict a slide and write its attention; the main rank writes.

    Raises:
        UserError: the run or the slide cannot be used, or the files cannot be written.
    """
    predictor = start_predictor(request.run, request)
    (answer,) = predictor.predict([NamedFile(request.slide.stem, request.slide, request.mpp_um)])
    if isinstance(answer, Failure):
        raise SlideError(answer.reason)
    if predictor.mesh.world.rank == 0:
        try:
            with predictor.open(answer.file) as slide:
                paths = write_attention(
                    request.out,
                    answer.file.slide_id,
                    slide,
                    answer.tiling,
                    attention_of(answer, predictor.run),
                    model=predictor.run.title,
                    says=predictor.says(answer),
                    max_px=request.max_px,
                    top=request.top,
                )
        except OSError as error:
            raise UserError(f"cannot write to {request.out}: {error}") from None
        for path in paths:
            log.info("%s", path)
