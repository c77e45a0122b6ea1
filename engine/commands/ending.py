"""How a command ends: its errors and its end before time are one line each, and its ranks leave in good order."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from slidescale.engine.errors import UserError
from slidescale.engine.process.launcher import is_main_rank
from slidescale.engine.process.plain_text import accept_any_encoding
from slidescale.engine.process.stopping import LAUNCHER_S, listening


@contextmanager
def command() -> Iterator[None]:
    """Run all that a command does: errors of the input and signals end it with one line, printed once for all ranks."""
    accept_any_encoding()
    with listening():
        try:
            yield
            _leave_ranks()
        except UserError as error:
            _exit_with(error)


def _leave_ranks() -> None:
    """Part from the other ranks, if this command has met any."""
    from slidescale.engine.parallel.mesh import stop_world  # imports PyTorch, which --help, being over here, never does

    stop_world()


def _exit_with(error: UserError) -> NoReturn:
    """End this process with an error of the input, which is printed once for all ranks."""
    # An error that all ranks find alike is printed by the main one at once, and the launcher then ends the others. A
    # rank that is still there after that has found it alone: a full disk, a machine without the manifest.
    if not is_main_rank():
        time.sleep(LAUNCHER_S + int(os.environ.get("LOCAL_RANK", 0)))
    sys.exit(f"error: {error}")
