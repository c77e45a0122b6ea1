"""How much memory a rank has used."""

import resource

import torch

GIB = 1024**3


def peak_gib(device: torch.device) -> float:
    """The most this process has held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB
