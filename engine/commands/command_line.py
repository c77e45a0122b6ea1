"""A command line made of a dataclass: its fields are the options, and their docstrings the --help."""

import dataclasses
import inspect
import shutil
import sys
import textwrap
from collections.abc import Sequence
from types import MappingProxyType
from typing import TypeVar, get_type_hints

import docstring_parser
import tyro

from slidescale.engine.errors import flag

HELP = {"--help", "-h"}
WIDTH = 120

Settings = TypeVar("Settings")


def without_local_rank(argv: Sequence[str] | None) -> list[str]:
    """The command line, None being the process's, without --local_rank=N: DeepSpeed's launcher adds it in front.

    The rank also stands in the environment, where the engine reads it.
    """
    return [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank=")]


def parse(
    kind: type[Settings],
    argv: Sequence[str],
    *,
    default: Settings | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> Settings:
    """Settings as a command line gives them; --help prints what there is and ends the process.

    Args:
        kind: a dataclass, with sections that are dataclasses.
        default: what the command line begins with; None: the defaults of `kind`.
        description: at the top of --help, paragraphs and indented lines of code; None: the docstring of `kind`.
        prog: the command; None: the script's name.

    Raises:
        ConfigError: `kind` refuses the settings.
        SystemExit: after --help, and for options that are not there.
    """
    if HELP & set(argv):
        _flow_help(kind)
        # By ourselves: tyro would neither break lines at the terminal's width nor keep single blank lines.
        width = min(shutil.get_terminal_size().columns, WIDTH)
        print(f"{fill(description or inspect.getdoc(kind) or '', width)}\n")
    if default is None:
        return tyro.cli(kind, prog=prog, args=argv, description="")
    return tyro.cli(kind, prog=prog, args=argv, description="", default=default)


def fill(text: str, width: int) -> str:
    """Paragraphs with lines of at most `width` characters; indented ones, which are code, stay as they are."""
    paragraphs = [part.strip("\n") for part in text.split("\n\n") if part.strip()]
    return "\n\n".join(
        part if part.startswith("    ") else textwrap.fill(part, width, break_long_words=False, break_on_hyphens=False)
        for part in paragraphs
    )


def demo_defaults(shown: dict[str, object], demo: dict[str, object]) -> str:
    """A paragraph for --help, which shows the defaults that a manifest's slides are trained with.

    Args:
        shown: those defaults, by dotted name.
        demo: the settings that take their place when there is no manifest.
    """
    values = [as_typed(name, value) for name, value in demo.items() if value != shown[name]]
    if not values:
        return ""
    return (
        "\n\nThe defaults below are those for your own slides (--data.manifest). Without a manifest, the demo cohort "
        f"has these instead: {', '.join(values)}."
    )


def as_typed(name: str, value: object) -> str:
    """A setting, by its dotted name, in the words of a command line."""
    if isinstance(value, bool):
        section, _, last = flag(name).rpartition(".")
        return flag(name) if value else f"{section}.no-{last}"
    return f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _flow_help(kind: type) -> None:
    """Let the help of each setting break where the terminal ends, and not where its docstring in the source does."""
    assert dataclasses.is_dataclass(kind)
    parents = [parent for parent in reversed(kind.__mro__) if dataclasses.is_dataclass(parent)]
    words = {
        each.arg_name: each.description
        for parent in parents
        for each in docstring_parser.parse_from_object(parent).params
    }
    hints = get_type_hints(kind)
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[each.name]):
            _flow_help(hints[each.name])
        elif text := words.get(each.name):
            each.metadata = MappingProxyType({"help": " ".join(text.split())})  # which tyro prefers to the docstring
