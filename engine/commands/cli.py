"""The command `slidescale`: what can be asked before a run, and what can be done with a trained one."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from slidescale.engine.commands.export import ExportRequest, export_encoder
from slidescale.engine.commands.heatmap import HeatmapRequest, draw_heatmap
from slidescale.engine.commands.plan import PlanRequest, print_plan
from slidescale.engine.commands.predict import PredictRequest, predict_slides
from slidescale.engine.commands.recipe import command
from slidescale.engine.logger import configure_logging
from slidescale.engine.parallel.mesh import is_main_rank

COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "plan": (PlanRequest, print_plan),
    "predict": (PredictRequest, predict_slides),
    "heatmap": (HeatmapRequest, draw_heatmap),
    "export": (ExportRequest, export_encoder),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; errors of the input are told in one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # DeepSpeed's launcher puts --local_rank=N in front; the same stands in the environment.
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    requests: dict[str, Callable[..., Any]] = {name: request for name, (request, _) in COMMANDS.items()}
    with command():
        request = tyro.extras.subcommand_cli_from_dict(requests, prog="slidescale", args=argv)
        perform = next(perform for kind, perform in COMMANDS.values() if isinstance(request, kind))
        if not isinstance(request, PlanRequest):  # which answers on stdout
            configure_logging(is_main_rank())
        perform(request)


if __name__ == "__main__":
    main()
