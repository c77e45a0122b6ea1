"""The recipes' settings."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from slidescale.engine.commands.recipe import main
from slidescale.engine.config import Config

ROOT = Path(__file__).parent.parent.parent


def load(name: str) -> ModuleType:
    """A recipe's settings; its call is for a script only."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(name: str, *words: str, presets: Mapping[str, Config] | None = None) -> None:
    """Run a recipe in this process, as with these words on its command line; what it refuses ends with SystemExit."""
    module = load(name)
    if presets is None and name == "egfr":
        presets = {"eagle": module.EAGLE}
    main(str(module.__doc__), default=module.STUDY, demo=module.DEMO, presets=presets, argv=words)
