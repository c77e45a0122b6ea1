"""Which implementation of the kernels runs: chosen once for a device, by name, and never changed behind one's back."""

from importlib.util import find_spec
from typing import Literal

import torch

KernelName = Literal["triton", "torch"]


def choose_kernels(asked: KernelName | Literal["auto"], device: torch.device) -> KernelName:
    """The implementation that a run uses on `device`.

    Args:
        asked: "triton": fused kernels for GPUs; "torch": the same results from PyTorch's operators, in blocks that
            bound memory; "auto": triton on a GPU for which its kernels are made (NVIDIA's from compute capability 8.0
            on, AMD's), where the package is installed, and torch elsewhere.

    Raises:
        ValueError: triton was asked for where it cannot run.
    """
    if asked == "auto":
        return "triton" if device.type == "cuda" and find_spec("triton") and has_tensor_cores(device) else "torch"
    if asked == "triton":
        check_triton(device)
    return asked


def check_name(kernels: str) -> None:
    """Raise ValueError where `kernels` names none: "auto" is for `choose_kernels` to decide."""
    if kernels not in ("triton", "torch"):
        raise ValueError(f"kernels is {kernels!r}: it must be 'triton' or 'torch'")


def has_tensor_cores(device: torch.device) -> bool:
    """Whether a GPU has them for bf16: on older ones the blocks of these kernels spill registers."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


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
