"""Checksums of a checkpoint's files: taken once all of them are on disk, and compared before any is loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from slidescale.engine.errors import UserError
from slidescale.engine.files import sync, write_json
from slidescale.engine.parallel.rank_group import RankGroup

CHECKSUMS = "checksums.json"


class Checksum(NamedTuple):
    """The length of a file and the SHA-256 of its content, in hexadecimal digits."""

    size: int
    sha256: str


def write_checksums(folder: Path, world: RankGroup) -> None:
    """Have all files under `folder` on disk, and write their checksums beside them, in checksums.json.

    Every rank calls this, once all of them have written; each reads a share of the files.
    """
    names = world.ask_main(
        lambda: sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and path != folder / CHECKSUMS
        )
    )
    mine: dict[str, Checksum] = {}
    for name in names[world.rank :: world.size]:
        sync(folder / name)
        mine[name] = _checksum(folder / name)
    found = {name: checksum for part in world.gather_objects(mine) for name, checksum in part.items()}
    if world.rank == 0:
        for path in folder.rglob("*"):
            if path.is_dir():
                sync(path)
        write_signed(folder / CHECKSUMS, {name: found[name]._asdict() for name in names})
    world.barrier()


def find_damage(folder: Path, world: RankGroup) -> str | None:
    """Compare all files under `folder` with their checksums; every rank calls this and reads a share of the files.

    Returns:
        The files that differ from what was written, in words and alike on every rank; None where there are none.
    """
    try:
        expected = world.ask_main(lambda: _read_checksums(folder / CHECKSUMS))
    except UserError as error:
        return str(error)
    mine = [_difference(folder, name, expected[name]) for name in sorted(expected)[world.rank :: world.size]]
    damaged = sorted(text for part in world.gather_objects(mine) for text in part if text)
    if not damaged:
        return None
    return damaged[0] + (f" (and {len(damaged) - 1} more of its files are damaged)" if len(damaged) > 1 else "")


def _checksum(path: Path) -> Checksum:
    with path.open("rb") as file:
        return Checksum(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_signed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that has its own checksum, under "sha256"."""
    write_json(path, content | {"sha256": _signature(content)})


def read_signed(path: Path) -> tuple[dict[str, Any], bool]:
    """Read what `write_signed` wrote, and whether it has a checksum; JSON without one is taken as it is.

    Raises:
        UserError: the file is missing or damaged; the message calls it by its name alone.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        signature = content.pop("sha256", None)
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing") from None
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path.name} is not what was written") from None
    if signature not in (None, _signature(content)):
        raise UserError(f"{path.name} has other content than was written")
    return content, signature is not None


def _signature(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_checksums(path: Path) -> dict[str, Checksum]:
    content, signed = read_signed(path)
    if not signed:
        raise UserError(f"{path.name} has other content than was written")
    return {name: Checksum(**each) for name, each in content.items()}


def _difference(folder: Path, name: str, expected: Checksum) -> str | None:
    """The difference between a file and what was written, in words; None where there is none."""
    try:
        size = (folder / name).stat().st_size
        if size != expected.size:
            return f"{name} has {size:,} bytes, and {expected.size:,} were written"
        if _checksum(folder / name) != expected:
            return f"{name} has other content than was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None
