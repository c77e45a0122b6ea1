"""The command line of a recipe."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from slidescale.engine.commands.command_line import HELP, demo_defaults, parse
from slidescale.engine.commands.ending import command
from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError
from slidescale.engine.logger import configure_logging
from slidescale.engine.process.launcher import is_main_rank


def main(
    description: str,
    *,
    default: Config,
    demo: Config,
    presets: Mapping[str, Config] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a recipe from the command line.

    Args:
        description: the recipe in words, for --help.
        default: the recipe's settings when a manifest is given.
        demo: its settings without one, for the demo cohort.
        presets: other settings to start from with a manifest, by the name that --preset gives.
        argv: the command line; None takes the process's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    configure_logging(is_main_rank())
    with command():
        base, argv = _choose_settings(argv, default, demo, presets or {})
        if presets:
            description += f"\n\n--preset NAME starts from other settings: {', '.join(presets)}."
        description += demo_defaults(base.flat(), demo.flat())
        run(parse(Config, argv, default=base, description=description))


def run(config: Config) -> Path:
    """Train as a config says; see `run.run`, which --help does not need and which takes seconds to import."""
    from slidescale.engine.run import run as train

    return train(config)


def is_study(argv: Sequence[str]) -> bool:
    """Whether a command line is about the user's own slides: it names them, or asks for help."""
    return any(word.split("=")[0] == "--data.manifest" or word in HELP for word in argv)


def _choose_settings(
    argv: list[str], default: Config, demo: Config, presets: Mapping[str, Config]
) -> tuple[Config, list[str]]:
    """The settings that the command line begins with, and the command line without --preset.

    Raises:
        ConfigError: there is no such preset, or no manifest for it.
    """
    on_own_slides = is_study(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        raise ConfigError(f"--preset: name one of {', '.join(presets) or 'none, for this recipe has none'}") from None
    if given.preset is None:
        return default if on_own_slides else demo, rest
    if given.preset not in presets:
        known = f"presets are: {', '.join(presets)}" if presets else "this recipe has no presets"
        raise ConfigError(f"--preset {given.preset}: {known}")
    if not on_own_slides:
        raise ConfigError(f"--preset {given.preset} is for your own slides: give --data.manifest slides.csv")
    return presets[given.preset], rest
