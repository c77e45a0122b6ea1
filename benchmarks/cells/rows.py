"""The results of a sweep on disk: one JSON object per line, found again when the sweep goes on."""

import json
from pathlib import Path
from typing import Any

from slidescale.engine.files import write_text


class Rows:
    """The rows of a sweep, each written as soon as it is known.

    A row is found again by its settings and its stamp. Rows of another machine, commit or version stay in the file, and
    are not found.

    Args:
        stamp: of this machine and software, as `common.machine.describe_machine` returns it.
    """

    def __init__(self, path: Path, stamp: dict[str, Any]) -> None:
        self._path = path
        self._stamp = stamp
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        whole = [line for line in lines if _is_whole(line)]
        if path.exists():
            # An interruption may have cut the last line short, and a new one must not continue it.
            write_text(path, "".join(f"{line}\n" for line in whole))
        self._rows = [row for line in whole if (row := json.loads(line))["stamp"] == stamp]

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Look up the latest row with these settings; one that failed or was not run is None, and is tried again."""
        wanted = _as_json(settings)
        found = next((row for row in reversed(self._rows) if row["settings"] == wanted), None)
        return None if found is None or found["status"] in ("failed", "not run") else found

    def add(self, row: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Write a row under its settings, and return it with them."""
        row = _as_json({**row, "settings": settings, "stamp": self._stamp})
        self._rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Make it what it is when read again: tuples become lists, and keys strings."""
    return json.loads(json.dumps(value))


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
