"""Output on a terminal, or into a file, whose encoding lacks some of the characters that are written."""

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
    """Let stdout and stderr write what their encoding lacks in plain characters, and never fail."""
    codecs.register_error("plain", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _replace(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that cannot be encoded (an error handler, as `codecs.register_error` takes them)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    """A character in ASCII: what looks like it, the letter without its accent, or else a question mark."""
    if character in PLAIN:
        return PLAIN[character]
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return letters or "?"
