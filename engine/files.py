"""Files that a run leaves: written whole or not at all, never over what is not a plain file, under names that fit."""

import csv
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# A file name may have 255 bytes on nearly every file system; endings such as "_attention.geojson" come on top.
NAME_BYTES = 120
DIGEST = re.compile(r"-[0-9a-f]{16}$")
# What a spreadsheet takes for the beginning of a formula (OWASP, "CSV injection").
FORMULA = ("=", "+", "-", "@", "\t", "\r")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give an empty file beside `path` to write to; once the block has ended well, it takes the place of `path`.

    Nothing is at `path` by halves, not even after a power failure: the file and its folder are on disk before this
    returns. The folder is made. Where the block raises, `path` stays as it was and the new file is removed.

    Raises:
        OSError: the file cannot be written, or `path` is something other than a plain file (a device, a folder, a
            symbolic link), which is left alone.
    """
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody uses, so that no file of the user is lost; with the ending, by which libraries know the format.
    unfinished = path.with_name(f".unfinished-{secrets.token_hex(8)}{path.suffix[:32]}")
    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(unfinished.stat().st_mode)  # as the user's mask leaves it
    try:
        yield unfinished
        unfinished.chmod(mode)  # safetensors makes a file of its own, which nobody else can read
        sync(unfinished)
        put_in_place(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give a file, or a folder, that is complete and on disk its name; a file takes the place of an earlier one.

    Where `replacing` does not do: for folders, and for what must not take its name before something else has happened.
    """
    unfinished.replace(path)
    sync(path.parent)


def point(link: Path, target: Path) -> None:
    """Make a symbolic link name what is beside it, at no moment naming nothing."""
    unfinished = link.with_name(f".{link.name}")
    unfinished.unlink(missing_ok=True)  # a process that was killed has left it
    unfinished.symlink_to(target.name)
    put_in_place(unfinished, link)


def check_replaceable(path: Path) -> None:
    """Refuse to put a file where something other than a plain file is.

    Raises:
        FileExistsError: what is there, in words.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISREG(mode):
        return
    if stat.S_ISLNK(mode):
        what = f"is a symbolic link to {os.readlink(path)}; name that file itself"
    elif stat.S_ISDIR(mode):
        what = "is a folder"
    else:
        what = "is a device or a pipe, and not a file"
    raise FileExistsError(errno.EEXIST, what, str(path))


def check_output(path: Path, inputs: Iterable[Path] = (), *, begins: bytes = b"") -> None:
    """Refuse a place for a result where writing would cost the user something, before work is spent on it.

    Args:
        inputs: files that are read, and must not be written over under whatever name.
        begins: first bytes of what is written; a file that is there and begins otherwise is someone else's.

    Raises:
        FileExistsError: what is there, in words.
    """
    check_replaceable(path)
    if not path.exists():
        return
    for each in inputs:
        if each.exists() and path.samefile(each):
            raise FileExistsError(errno.EEXIST, f"is an input, {each}; name another file", str(path))
    with path.open("rb") as file:
        found = file.read(len(begins))
    if found not in (b"", begins):
        raise FileExistsError(errno.EEXIST, "is there, and is no such result; name another file", str(path))


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on disk before going on (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; see `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; see `replacing`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table, in which a spreadsheet finds no formulas (see `spreadsheet_cell`); see `replacing`."""
    with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([spreadsheet_cell(name) for name in header])
        writer.writerows([spreadsheet_cell(cell) for cell in row] for row in rows)


def spreadsheet_cell(cell: object) -> object:
    """A cell that a spreadsheet shows as it is: text that it would take for a formula gets an apostrophe in front."""
    if not isinstance(cell, str) or not cell.startswith(FORMULA):
        return cell
    with suppress(ValueError):
        float(cell)  # a negative number
        return cell
    return f"'{cell}"


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write a uint8 `[H, W, 3]` picture; see `replacing`."""
    with replacing(path) as unfinished:
        Image.fromarray(picture).save(unfinished, format="PNG")


def file_name(name: str) -> str:
    """A file name for a slide_id, a case or a label: readable, of `NAME_BYTES` bytes at most, and different for each.

    Letters and digits of any script, spaces and `. - + _` stay as they are. Anything else becomes `_`, a long name is
    cut, and a digest of the whole name is added, so that no name leads out of its folder, none is too
    long, and no two are the same.
    """
    plain = re.sub(r"[^\w .+-]", "_", name)
    if plain.startswith((".", "-", " ")):
        plain = f"_{plain[1:]}"
    fits = len(plain.encode()) <= NAME_BYTES and not plain.endswith((".", " "))
    if plain == name and name and fits and not DIGEST.search(name):
        return name
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    cut = plain.encode()[: NAME_BYTES - len(digest) - 1].decode(errors="ignore")
    return f"{cut}-{digest}"
