"""Encoders and aggregators of one's own, which a setting names by package.module:Class."""

import importlib
from typing import Any

from torch import nn

from slidescale.engine.errors import ConfigError, near

# What timm itself reads before a colon: where a model is, on a hub or on disk.
TIMMS = ("hf-hub", "hf_hub", "local-dir")


def is_custom(name: str) -> bool:
    """Whether a name is package.module:Class, and not timm's own for a model on a hub."""
    return ":" in name and name.split(":")[0] not in TIMMS


def make_custom(setting: str, name: str, *args: Any) -> nn.Module:
    """Import a class, or any function that makes a module, and call it.

    Args:
        setting: that names it, for messages.
        name: package.module:Class.
        args: it is called with.

    Raises:
        ConfigError: it cannot be imported or called so, or returns no module.
    """
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise ConfigError(
            f"{setting} {name}: cannot import {module_name}: {error}; for a file in this folder, put the folder on "
            "Python's path: PYTHONPATH=."
        ) from error
    except AttributeError:
        known = dir(importlib.import_module(module_name))
        raise ConfigError(f"{setting} {name}: {module_name} has no {attribute}" + near(attribute, known)) from None
    try:
        made = found(*args)
    except TypeError as error:
        words = ", ".join(map(repr, args))
        raise ConfigError(f"{setting} {name}: cannot be called as {attribute}({words}): {error}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{setting} {name}: makes a {type(made).__name__}, and must make a torch.nn.Module")
    return made
