"""The command `slidescale`: what can be asked before a run, and what can be done with a trained one.

A command is imported when it runs, so that --help needs none of the libraries that take seconds to import.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from slidescale.engine.commands.command_line import parse, without_local_rank
from slidescale.engine.commands.ending import command
from slidescale.engine.logger import configure_logging
from slidescale.engine.process.launcher import is_main_rank


class Command(NamedTuple):
    """A command of `slidescale`.

    Attributes:
        settings: dataclass that its command line makes, as "module:Class" in this package.
        function: what takes these settings and does the work, likewise.
        about: what it does, in a line of --help.
    """

    settings: str
    function: str
    about: str


COMMANDS = {
    "plan": Command("plan:PlanRequest", "plan:print_plan", "memory and time of a training step, before there is a GPU"),
    "predict": Command("requests:PredictRequest", "predict:predict_slides", "predict slides with a trained run"),
    "heatmap": Command("requests:HeatmapRequest", "heatmap:draw_heatmap", "draw where a trained run looks on a slide"),
    "export": Command("requests:ExportRequest", "export:export_encoder", "write a trained encoder for timm"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; an error of the input is one line."""
    argv = without_local_rank(argv)
    with command():
        name = _choose(argv)
        request = parse(_find(COMMANDS[name].settings), argv[1:], prog=f"slidescale {name}")
        if name != "plan":  # which answers on stdout
            configure_logging(is_main_rank())
        _find(COMMANDS[name].function)(request)


def _choose(argv: Sequence[str]) -> str:
    """The command that a line begins with.

    Raises:
        SystemExit: it is --help, or begins with none.
    """
    lines = "\n".join(f"  {name:<9} {command.about}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="slidescale",
        usage="slidescale COMMAND ...",
        description=f"commands (slidescale COMMAND --help lists the settings of one):\n{lines}",
        epilog="Recipes train: python recipes/egfr.py --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser.parse_args(argv[:1]).command


def _find(place: str) -> Any:
    """What is called "module:name" in this package."""
    module, name = place.split(":")
    return getattr(import_module(f"slidescale.engine.commands.{module}"), name)


if __name__ == "__main__":
    main()
