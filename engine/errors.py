"""Errors that are the input's, not the program's: shown to the user as a message, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the settings, the manifest, the slides or the run needs the user's attention."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot be run."""


class ManifestError(UserError):
    """A manifest that cannot be trained on; the message lists every problem with its row."""


class SlideError(UserError):
    """A slide that cannot be used; the run sets it aside and goes on."""


class SlideUnavailableError(SlideError):
    """A slide that cannot be read now, as while a network file system is away; the run tries it again later."""


class TrainingError(UserError):
    """A run that must stop, e.g. because a loss is not finite."""


def near(name: str, candidates: Iterable[str]) -> str:
    """The question whether another name was meant, if one is like it."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def flag(name: str) -> str:
    """A setting as it is typed: "--data.tile-px" for "data.tile_px"."""
    return f"--{name.replace('_', '-')}"


def first_line(error: BaseException) -> str:
    """An error of a library in one line, for the end of a message: its type, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
