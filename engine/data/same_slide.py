"""Files of a manifest that are one slide: another spelling, a link, a copy, or another image of a DICOM series."""

import hashlib
import os
import stat
import struct
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

# Files that are read at the same time; a network file system answers each after milliseconds.
THREADS = 16
# Files of one size are compared by pieces of so many bytes: first by three of them, and where these agree by as many
# as make it certain (in uncompressed slides, three can be empty glass).
PIECE_BYTES, FEW, MANY = 65536, 3, 64
# Bytes in which a DICOM file has named its series; a WSI's large attributes come after it.
DICOM_HEAD_BYTES = 262144
SERIES = (0x0020, 0x000E)
# Value representations whose length takes four bytes (DICOM PS3.5, 7.1.2).
LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
UNDEFINED = 0xFFFFFFFF


class Same(NamedTuple):
    """Two rows that name one slide: indices among the files, and how that was seen."""

    first: int
    second: int
    how: str


@dataclass(frozen=True)
class Looked:
    """A file as the system knows it, or why it cannot be used."""

    inode: tuple[int, int] = (0, 0)
    size: int = 0
    fault: str | None = None


def look_at(files: Sequence[Path]) -> list[Looked]:
    """Look at each file: whether it is a plain one, and what distinguishes it from others."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_look_at, files))


def same_slides(files: Sequence[Path], looked: Sequence[Looked]) -> list[Same]:
    """Pairs of files that are one slide; each file stands at most once as the second.

    A file is the same under any spelling of its path, through symbolic and hard links (device and inode), as a copy
    (the size, and pieces of its content) and as another image of a DICOM series (the SeriesInstanceUID in its head,
    which DICOM wants to be that of one slide). A slide that was scanned twice or stored in another format is not seen
    to be the same, nor is a DICOM file in implicit VR or deflated.

    Args:
        looked: as `look_at` returns them; files with a fault are left out, and no file is a copy of an empty one.
    """
    usable = [index for index, found in enumerate(looked) if found.fault is None]
    found: dict[int, Same] = {}
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index in usable:
        groups[looked[index].inode].append(index)
    for first, *others in groups.values():
        # Sizes, in case a file system gives files of one inode.
        found |= {other: Same(first, other, "the same file") for other in others if looked[other] == looked[first]}
    by_size: dict[int, list[int]] = defaultdict(list)
    for index in usable:
        if index not in found and looked[index].size:
            by_size[looked[index].size].append(index)
    with ThreadPoolExecutor(THREADS) as pool:
        alike = [those for those in by_size.values() if len(those) > 1]
        for pieces in (FEW, MANY):
            of = [index for those in alike for index in those]
            digests = dict(zip(of, pool.map(_digest, (files[index] for index in of), repeat(pieces)), strict=True))
            alike = [group for those in alike for group in _alike(those, digests)]
        for first, *others in alike:
            found |= {other: Same(first, other, "a copy of the file") for other in others}
        rest = [index for index in usable if index not in found]
        series = dict(zip(rest, pool.map(_series_of, (files[index] for index in rest)), strict=True))
    for first, *others in _alike(rest, series):
        found |= {other: Same(first, other, "of the same DICOM series as the file") for other in others}
    return sorted(found.values(), key=lambda same: same.second)


def _alike(indices: Sequence[int], keys: dict[int, str | None]) -> Iterator[list[int]]:
    """Groups of two or more indices with one key."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index in indices:
        if (key := keys[index]) is not None:
            groups[key].append(index)
    return (group for group in groups.values() if len(group) > 1)


def _look_at(path: Path) -> Looked:
    try:
        status = path.stat()
    except FileNotFoundError:
        return Looked(fault=f"no file {path}")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return Looked(fault=f"no file {path}: {getattr(error, 'strerror', None) or error}")
    if not stat.S_ISREG(status.st_mode):
        return Looked(fault=f"no file {path}: is " + ("a folder" if stat.S_ISDIR(status.st_mode) else "a device"))
    # Where a file system has no inodes, the path distinguishes files.
    inode = (status.st_dev, status.st_ino) if status.st_ino else (0, hash(path.resolve()))
    return Looked(inode, status.st_size)


def _digest(path: Path, pieces: int) -> str | None:
    """Digest of pieces of a file, from its first bytes to its last; None where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    with suppress(OSError), path.open("rb", buffering=0) as file:
        last = max(0, os.fstat(file.fileno()).st_size - PIECE_BYTES)
        for index in range(pieces):
            digest.update(os.pread(file.fileno(), PIECE_BYTES, last * index // (pieces - 1)))
        if path.suffix.lower() == ".mrxs":  # a picture, which many slides may have alike; their data is beside it
            digest.update((path.with_suffix("") / "Slidedat.ini").read_bytes())
        return digest.hexdigest()
    return None


def _series_of(path: Path) -> str | None:
    """The SeriesInstanceUID of a DICOM file in explicit VR, little endian, as nearly all slides are stored."""
    ending = path.suffix.lower()
    if ending not in ("", ".dcm", ".dicom") and not ending[1:].isdigit():  # the end of a UID
        return None
    with suppress(OSError, struct.error), path.open("rb", buffering=0) as file:
        if os.pread(file.fileno(), 4, 128) == b"DICM":
            return _series_in(os.pread(file.fileno(), DICOM_HEAD_BYTES, 0), 132)
    return None


def _series_in(head: bytes, at: int) -> str | None:
    """Walk the elements of a dataset (DICOM PS3.5, 7.1) to the series UID, past those nested in sequences.

    Raises:
        struct.error: the head ends before.
    """
    depth = 0
    while True:
        group, element = struct.unpack_from("<HH", head, at)
        if group == 0xFFFE:  # an item, or the end of an item or a sequence, whose content has no VR before it
            (length,) = struct.unpack_from("<I", head, at + 4)
            at += 8
            if element == 0xE000:
                depth, at = (depth + 1, at) if length == UNDEFINED else (depth, at + length)
            else:
                depth -= 1
            continue
        kind = head[at + 4 : at + 6]
        if kind in LONG:
            (length,), at = struct.unpack_from("<I", head, at + 8), at + 12
        else:
            (length,), at = struct.unpack_from("<H", head, at + 6), at + 8
        if not kind.isalpha():
            return None  # implicit VR
        if depth == 0 and (group, element) == SERIES:
            return head[at : at + length].rstrip(b"\0 ").decode(errors="replace") or None
        if depth == 0 and (group, element) > SERIES:
            return None
        if length == UNDEFINED:
            depth += 1
        else:
            at += length
