"""Output to a terminal or file whose encoding lacks some characters."""

import codecs
import io
import sys
import unicodedata

PLAIN = {
    "×": "x",
    "−": "-",
    "–": "-",
    "─": "-",
    "━": "-",
    "│": "|",
    "┃": "|",
    "µ": "u",
    "μ": "u",
    "σ": "sigma",
    "∂": "d",
    "≤": "<=",
    "≥": ">=",
    "±": "+/-",
    "…": "...",
    "→": "->",
    "·": ".",
    "•": "*",
    "█": "#",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}
# Corners and crossings of drawn boxes.
PLAIN |= dict.fromkeys((chr(code) for code in range(0x2500, 0x2580) if chr(code) not in PLAIN), "+")


def accept_any_encoding() -> None:
    """Make stdout and stderr write plain characters for those that their encoding lacks, instead of failing."""
    codecs.register_error("plain", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that cannot be encoded; an error handler for `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    """A character in ASCII: one that looks like it, the letter without its accent, or a question mark."""
    if character in PLAIN:
        return PLAIN[character]
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return letters or "?"
