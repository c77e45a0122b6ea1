"""The settings of a run as its config.json holds them, read back by whatever version has written them."""

from pathlib import Path
from typing import Any

import dacite

from slidescale.engine.config import Config, RunConfig, flatten
from slidescale.engine.errors import ConfigError, UserError, near

# Settings of earlier versions whose every value gave the same model and the same training.
WITHOUT_EFFECT = {"model.transformer_spread"}


def read_config(settings: dict[str, Any], source: Path, version: str) -> Config:
    """Build a Config from JSON. A setting that the JSON lacks has its default, which is how it was before it existed.

    Args:
        settings: as `Config.as_dict` makes them.
        source: file that has them, for messages.
        version: of slidescale, which wrote it.

    Raises:
        UserError: it has settings that this version does not know, or values that it refuses.
    """
    known = Config(run=RunConfig(name="any")).flat()
    unknown = [name for name in flatten(settings) if name not in known and name not in WITHOUT_EFFECT]
    if unknown:
        lines = [name + near(name, known) for name in unknown]
        raise UserError(
            f"{source} was written by slidescale {version}, with settings that this version does not have:\n  "
            + "\n  ".join(lines)
            + f"\nuse slidescale {version}"
        )
    try:  # names that are no setting are left out: those without effect
        return dacite.from_dict(Config, settings, dacite.Config(type_hooks={Path: Path}, cast=[tuple]))
    except (ConfigError, dacite.DaciteError, TypeError) as error:
        raise UserError(f"{source} was written by slidescale {version}, and this version refuses: {error}") from None
