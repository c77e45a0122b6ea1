"""Reading that survives a passing I/O error, such as network file systems give, and knows it from damage."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from slidescale.engine.errors import SlideError, SlideUnavailableError

Result = TypeVar("Result")

# Seconds before the second try, and before the third, which is the last.
PAUSES_S = (0.5, 2.0)
# Where the file itself looks sound, it is most likely damaged, and a shorter wait will do.
SOUND_SHARE = 0.2
# Errors that waiting does not mend. All others may pass: EIO, ESTALE, ETIMEDOUT, EAGAIN, ENOTCONN, EMFILE, …
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
LASTING |= {errno.EINVAL, errno.ENXIO}
# Bytes to read at a file's beginning, middle and end, to see whether it can be read at all.
PROBE_BYTES = 4096


def reading(path: Path, what: str, attempt: Callable[[], Result], failures: tuple[type[Exception], ...]) -> Result:
    """Read from a file, up to three times, with pauses between.

    Libraries that decode a file hide the system's error, so after each failure the file is looked at directly. It
    "cannot be read now" where that look met an error that may pass, or where the file has changed since the first try.
    It is "damaged" where the file could be read every time, and decoding it failed all the same. What this cannot see:
    an error that strikes all three tries and none of the looks between them counts as damage, and a disk whose sectors
    are broken for good (EIO) counts as passing.

    Args:
        path: the file.
        what: begins a message: what could not be done, with the path.
        attempt: called without arguments.
        failures: errors that it raises when it could not read.

    Raises:
        SlideUnavailableError: the file cannot be read now.
        SlideError: it is not there, may not be read, or is damaged.
    """
    before, passing, reason = _identity(path), None, ""
    for pause in (*PAUSES_S, None):
        try:
            return attempt()
        except failures as error:
            reason = str(error)
            found = error if isinstance(error, OSError) and error.errno is not None else look(path)
        if found is not None and found.errno in LASTING:
            raise SlideError(f"{what}: {_words(found)}") from None
        passing = found or passing
        if pause is not None:
            time.sleep(pause if found is not None else pause * SOUND_SHARE)
    if passing is not None:
        raise SlideUnavailableError(f"{what} now, in {len(PAUSES_S) + 1} tries: {_words(passing)}")
    if _identity(path) != before:
        raise SlideUnavailableError(f"{what} now: the file is being written ({reason})")
    raise SlideError(f"{what}: {reason}")


def fault(what: str, error: OSError) -> SlideError:
    """The slide's error for an error of the system."""
    kind = SlideError if error.errno in LASTING else SlideUnavailableError
    return kind(f"{what}: {_words(error)}")


def look(path: Path) -> OSError | None:
    """Read a little of a file's beginning, middle and end, and return the error that this met, if any."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
        try:
            size = os.fstat(descriptor).st_size
            for at in (0, size // 2, max(0, size - PROBE_BYTES)):
                os.pread(descriptor, PROBE_BYTES, at)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error
    except ValueError as error:  # a NUL in the name
        return OSError(errno.EINVAL, str(error))
    return None


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Numbers that change when a file is written to or replaced; None where they cannot be read."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _words(error: OSError) -> str:
    return "no such file" if error.errno == errno.ENOENT else error.strerror or str(error)
