"""A recipe's command line, and what all commands have in common."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import tyro

from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.logger import configure_logging
from slidescale.engine.parallel.mesh import is_main_rank, stop_world
from slidescale.engine.process.plain_text import accept_any_encoding
from slidescale.engine.process.stopping import LAUNCHER_S, listening

HELP = {"--help", "-h"}


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
        description: shown by --help.
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
        config = tyro.cli(Config, default=base, args=argv, description=description)
        run(config)


def run(config: Config) -> Path:
    """Train as a config says; see `run.run`, which takes seconds to import, and which --help does not need."""
    from slidescale.engine.run import run as train

    return train(config)


@contextmanager
def command() -> Iterator[None]:
    """Around all that a command does: its errors and its end before time are one line, told once over all ranks."""
    accept_any_encoding()
    with listening():
        try:
            yield
            stop_world()
        except UserError as error:
            _exit_telling(error)


def is_study(argv: Sequence[str]) -> bool:
    """Whether a command line is about the user's own slides: it names them, or asks for help."""
    return any(word.split("=")[0] == "--data.manifest" or word in HELP for word in argv)


def demo_defaults(shown: Mapping[str, object], demo: Mapping[str, object]) -> str:
    """A paragraph for --help, which shows the defaults that a manifest's slides are trained with.

    Args:
        shown: those defaults, by dotted name.
        demo: the settings that take their place when there is no manifest.
    """
    values = [_as_typed(name, value) for name, value in demo.items() if value != shown[name]]
    if not values:
        return ""
    return (
        "\n\nThe defaults below are those for your own slides (--data.manifest). Without a manifest, the demo cohort "
        f"has these instead: {', '.join(values)}."
    )


def _as_typed(name: str, value: object) -> str:
    """A setting in the words of a command line."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        section, _, last = flag.rpartition(".")
        return flag if value else f"{section}.no-{last}"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _exit_telling(error: UserError) -> NoReturn:
    """End this process with an error of the input, which is told once over all ranks."""
    # What all ranks find alike, the main one tells at once, and the launcher then ends the others. A rank that is
    # still there after that has found it alone: a full disk, a machine without the manifest.
    if not is_main_rank():
        time.sleep(LAUNCHER_S + int(os.environ.get("LOCAL_RANK", 0)))
    sys.exit(f"error: {error}")


def _choose_settings(
    argv: list[str], default: Config, demo: Config, presets: Mapping[str, Config]
) -> tuple[Config, list[str]]:
    """The settings that the command line begins with, and the command line without --preset.

    Raises:
        ConfigError: no such preset, or no manifest for it.
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
        raise ConfigError(f"--preset {given.preset} is for a study's slides: give --data.manifest slides.csv")
    return presets[given.preset], rest
