"""How a command ends early: by Ctrl-C, by a signal of the scheduler, or because its launcher is gone.

It unwinds, prints in one line where it stood and how to go on, and ends with 128 plus the number of the signal, as
shells expect. A rank that waits in a collective runs no Python code and would never act on a signal. So a thread sees
the signal, too, and ends the process if it does not unwind by itself.
"""

import _thread
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from slidescale.engine.process import launcher
from slidescale.engine.process.launcher import is_main_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Time for unwinding: files are closed, and reads that have begun end. Launchers send SIGKILL after 30 s.
GRACE_S = 5.0
# How often a rank checks that its launcher is still there.
LOOK_S = 1.0
# After the first rank ends, a launcher ends the rest within a second, DeepSpeed's and torchrun's alike; on a busy
# machine it takes longer.
LAUNCHER_S = 30.0

AGAIN = "nothing is there to resume yet: give the same command again"
RESUME = "to go on, give the same command with --resume"


class Stopped(KeyboardInterrupt):
    """Raised when the process has been asked to end."""


class _State:
    """The signal that the process has got, if any, and what it is doing."""

    def __init__(self) -> None:
        self.number: int | None = None  # the signal
        self.cause = ""
        self.where = ""
        self.advice = ""
        self.keeps_advice = False


_state = _State()
_ending = threading.Lock()


def note(where: str, advice: str) -> None:
    """Record what is under way, for the line that is printed when the process is stopped.

    Args:
        where: follows "stopped", such as "in epoch 3".
        advice: how to go on.
    """
    if _state.number is None:  # otherwise the code that unwinds is calling
        _state.where = where
        if not _state.keeps_advice:
            _state.advice = advice


def keep_advice(advice: str) -> None:
    """Give this advice whatever is under way, for a command that makes many runs."""
    _state.advice, _state.keeps_advice = advice, True


@contextmanager
def listening() -> Iterator[None]:
    """End the process in good order if it is asked to end while the block runs.

    Signals that are ignored (as under nohup) stay ignored. A process that a launcher has started ends
    with it.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    _state = _State()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    inlet, outlet = os.pipe()
    os.set_blocking(outlet, False)
    former_outlet = signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _ask)
    watch = threading.Thread(target=_watch, args=(inlet, launcher.STARTED_BY), name="stop-watch", daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and launcher.STARTED_BY and not is_main_rank():
            # Another rank may have been stopped first and have closed its connections.
            with suppress(Stopped):
                time.sleep(LAUNCHER_S)
        if _state.number is not None:
            _end()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_outlet)
        os.write(outlet, b"\0")
        watch.join()
        os.close(inlet)
        os.close(outlet)


def _ask(number: int, _: FrameType | None) -> None:
    """Begin to unwind; later signals change nothing."""
    if _state.number is None:
        _state.number = number
        raise Stopped


def _watch(inlet: int, launchers: tuple[int, ...]) -> None:
    """End the process if it has not unwound in time after a signal, or on a second Ctrl-C."""
    deadline: float | None = None
    by_hand = 0
    while True:
        wait = LOOK_S if launchers else None
        if deadline is not None:
            wait = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([inlet], [], [], wait)
        noted = os.read(inlet, 64) if ready else b""
        if 0 in noted:
            return
        numbers = bytes(number for number in noted if number in SIGNALS)  # a library may handle others
        if deadline is None and not numbers and launcher.is_lost(launchers):
            _state.cause = "the launcher has ended: "
            _thread.interrupt_main(signal.SIGTERM)  # as if the signal had come; it may be ignored here
            numbers = bytes([signal.SIGTERM])
        by_hand += numbers.count(signal.SIGINT)
        if numbers and deadline is None:
            deadline = time.monotonic() + GRACE_S
            asked = numbers[0]
        if by_hand > 1 or (deadline is not None and time.monotonic() >= deadline):
            if _state.number is None:  # the main thread has run no Python code since
                _state.number = asked
            _end()


def _end() -> None:
    """Print where the command stood and end the process; of two threads that come here, the second waits.

    It raises no exception: what libraries and other threads do at the end of a process would wait for ranks that are no
    longer there, or complain about them.
    """
    _ending.acquire()
    with suppress(OSError, ValueError):  # the terminal may be gone, or the launcher that reads this
        if is_main_rank():
            begin = "\n" if sys.stderr.isatty() else ""  # after the ^C that a terminal shows
            print(f"{begin}{_state.cause}{describe()}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(128 + (_state.number or signal.SIGTERM))


def describe() -> str:
    """One line: where the command stands, and how to go on."""
    where = f"stopped {_state.where}".strip()
    return f"{where}; {_state.advice}" if _state.advice else where
