"""Memory of this process: what it holds, has held, and could still take."""

import ctypes
import gc
import resource
from pathlib import Path

import torch

from slidescale.engine.errors import ConfigError
from slidescale.engine.units import GIB

# Memory that a container or a scheduler's job may take and has taken: control groups of version 2 and 1.
CONTAINER_LIMITS = [
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
RETURNED = 1024**2
MMAP_MAX = 65536  # glibc's own


def peak_gib(device: torch.device) -> float:
    """The most this process has held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # Not getrusage's ru_maxrss, which starts from that of the process that started this one.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / GIB  # it says kB, and counts in KiB
    raise OSError("/proc/self/status does not state the peak of resident memory")


def reset_peak(device: torch.device) -> None:
    """Let `peak_gib` begin anew: free what nothing holds, and forget what was held so far."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): sets VmHWM to what is resident now


def available_bytes(device: torch.device) -> int:
    """What this process could still take.

    On a GPU, what is free there and in the allocator's own stock; on a CPU, what is free or reclaimable on the
    machine or in its container, for all its processes together.

    Raises:
        ConfigError: the system does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemAvailable:")
    ]
    for most, used in CONTAINER_LIMITS:
        if most.exists() and (text := most.read_text(encoding="ascii").strip()) != "max":
            limits.append(int(text) - int(used.read_text(encoding="ascii")))
    if not limits:
        raise ConfigError("/proc/meminfo does not state what is available: give --memory.budget")
    return max(0, min(limits))


def held_bytes(device: torch.device) -> int:
    """What this process holds now: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def return_freed_memory() -> bool:
    """Let glibc give large blocks back to the system as soon as they are freed; call it before the model is built.

    By default glibc keeps blocks of up to 32 MiB for itself once it has seen such a one freed, and as tensors of
    other sizes follow, resident memory grows by up to 60% of a chunk's activations beyond what is alive. With blocks
    from RETURNED bytes on mapped one by one, it follows what is alive within about 10%. The price is that the system
    clears their pages again, 20% to 30% more processor time per step with ResNet-18; 6% (fp32) to 22% (bf16) with huge
    pages, which PyTorch takes if THP_MEM_ALLOC_ENABLE=1 is in the environment when it starts. So it is for runs whose
    memory has a limit.

    Returns:
        Whether it took effect; without glibc it does not.
    """
    # The threshold last: setting it is what stops glibc from moving it.
    return (
        _mallopt(M_MMAP_MAX, MMAP_MAX) and _mallopt(M_TRIM_THRESHOLD, RETURNED) and _mallopt(M_MMAP_THRESHOLD, RETURNED)
    )


def keep_freed_memory() -> bool:
    """Let glibc keep all that it ever had, for runs whose memory has no limit: the opposite of `return_freed_memory`.

    Left alone, it gives the top of its memory back each time that a step's activations are freed, and the system clears
    the pages anew for the next step: 9% of the time of ResNet-18's steps under policy keep, and 5% under recompute.

    Returns:
        Whether it took effect; without glibc it does not.
    """
    return _mallopt(M_TRIM_THRESHOLD, -1) and _mallopt(M_MMAP_MAX, 0)


def _mallopt(parameter: int, value: int) -> bool:
    library = ctypes.CDLL(None)
    return hasattr(library, "mallopt") and library.mallopt(parameter, value) == 1
