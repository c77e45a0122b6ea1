"""The launcher that has started this process, torchrun or DeepSpeed's, and whether it is still there.

The package itself imports this before PyTorch, whose import takes seconds in which a launcher may die.
"""

import os
from contextlib import suppress
from pathlib import Path

# Programs that start ranks: a script of this name, or a module that Python runs.
LAUNCHERS = {"torchrun", "deepspeed", "torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch"}


def is_main_rank() -> bool:
    """Whether this process speaks for all ranks; known before they meet."""
    return int(os.environ.get("RANK", 0)) == 0


def find_launchers() -> tuple[int, ...]:
    """The parent of this process, its parent and so on, up to the outermost launcher; empty without a launcher.

    torchrun starts ranks itself. `deepspeed` starts a launcher for this machine, which starts them; either may be lost.
    """
    if "LOCAL_RANK" not in os.environ:
        return ()
    # A program that starts ranks as torchrun does, by its library, has another name.
    chain, count = [os.getppid()], int("TORCHELASTIC_RUN_ID" in os.environ)
    while chain[-1] > 0:
        if _is_launcher(_words(chain[-1])):
            count = len(chain)
        chain.append(_parent(chain[-1]))
    return tuple(chain[:count])


def is_lost(launchers: tuple[int, ...]) -> bool:
    """Whether a launcher has ended: the process that it started has another parent since."""
    pids = (os.getpid(), *launchers)
    return any(_parent(pid) != parent for pid, parent in zip(pids, launchers, strict=False))


def _parent(pid: int) -> int:
    """The parent of a process; 0 if unknown."""
    if pid == os.getpid():
        return os.getppid()
    with suppress(OSError, ValueError, IndexError):
        # Behind the name, which is in brackets and may hold anything: the state, the parent, and more.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return 0


def _words(pid: int) -> list[str]:
    """The command line of a process; empty if unknown."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    return []


def _is_launcher(words: list[str]) -> bool:
    """Whether a command line is that of a launcher, and not of a shell or a tool that has started one."""
    if words and Path(words[0]).name.startswith("python"):
        words = words[1:]
        while words and words[0].startswith("-"):  # Python's own options
            words = words[1:]
    return bool(words) and Path(words[0]).name in LAUNCHERS


# The launchers of this process.
STARTED_BY = find_launchers()
