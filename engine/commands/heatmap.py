"""`slidescale heatmap`: where a trained run looks on a slide."""

import logging

from slidescale.engine.commands.predict import Failure, attention_of, start_predictor
from slidescale.engine.commands.requests import HeatmapRequest
from slidescale.engine.data.manifest import NamedFile
from slidescale.engine.errors import SlideError, UserError
from slidescale.engine.evaluation.attention import write_attention

log = logging.getLogger(__name__)


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
