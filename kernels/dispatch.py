"""Which implementation of the kernels runs: chosen once for a device, by name, and never changed behind one's back."""

from importlib.util import find_spec
from typing import Literal

import torch

KernelName = Literal["triton", "torch"]
KernelChoice = Literal["auto", "triton", "torch"]


def choose_kernels(asked: KernelChoice, device: torch.device) -> KernelName:
    """The implementation that a run uses on `device`.

    Args:
        asked: "triton": fused kernels for GPUs; "torch": the same results from PyTorch's operators, in blocks that
            bound memory; "auto": triton on a GPU, torch elsewhere.

    Raises:
        ValueError: triton was asked for where it cannot run.
    """
    if asked == "auto":
        return "triton" if device.type == "cuda" and find_spec("triton") else "torch"
    if asked == "triton":
        check_triton(device)
    return asked


def check_triton(device: torch.device) -> None:
    """Raise ValueError where Triton's kernels cannot run on tensors of `device`."""
    if find_spec("triton") is None:
        raise ValueError("triton kernels were asked for, and the package triton is not installed")
    if device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"triton kernels were asked for on a {device.type} device: they need an NVIDIA or AMD GPU; "
            "'torch' computes the same here"
        )


def is_interpreted() -> bool:
    """Whether Triton emulates its kernels on the CPU (TRITON_INTERPRET=1), for tests."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
