"""A recipe's command line."""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

import tyro

from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.logger import configure_logging
from slidescale.engine.parallel.mesh import is_main_rank, stop_world
from slidescale.engine.run import run

# The launcher ends all ranks within a second of the first one's end, DeepSpeed's and torchrun's alike.
GRACE_S = 10.0


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
    try:
        base, argv = _choose_settings(argv, default, demo, presets or {})
        if presets:
            description += f"\n\n--preset NAME starts from other settings: {', '.join(presets)}."
        config = tyro.cli(Config, default=base, args=argv, description=description)
        run(config)
        stop_world()
    except UserError as error:
        exit_telling(error)


def has_manifest(argv: Sequence[str]) -> bool:
    """Whether a command line names the user's own slides."""
    return any(word.split("=")[0] == "--data.manifest" for word in argv)


def exit_telling(error: UserError) -> NoReturn:
    """End this process with an error of the input, which is told once over all ranks."""
    # What all ranks find alike, the main one tells at once, and the launcher then ends the others. A rank that is
    # still there after that has found it alone: a full disk, a machine without the manifest.
    if not is_main_rank():
        time.sleep(GRACE_S + int(os.environ.get("LOCAL_RANK", 0)))
    sys.exit(f"error: {error}")


def _choose_settings(
    argv: list[str], default: Config, demo: Config, presets: Mapping[str, Config]
) -> tuple[Config, list[str]]:
    """The settings that the command line begins with, and the command line without --preset.

    Raises:
        ConfigError: no such preset, or no manifest for it.
    """
    is_study = has_manifest(argv)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        raise ConfigError(f"--preset: name one of {', '.join(presets) or 'none, for this recipe has none'}") from None
    if given.preset is None:
        return default if is_study else demo, rest
    if given.preset not in presets:
        known = f"presets are: {', '.join(presets)}" if presets else "this recipe has no presets"
        raise ConfigError(f"--preset {given.preset}: {known}")
    if not is_study and not {"--help", "-h"} & set(rest):
        raise ConfigError(f"--preset {given.preset} is for a study's slides: give --data.manifest slides.csv")
    return presets[given.preset], rest
