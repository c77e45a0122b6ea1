"""A model's weights in one file, `model.safetensors`, whatever strategy it was trained under.

The format is that of the safetensors library (https://huggingface.co/docs/safetensors, "Format"), written here because
the library wants all tensors in memory at once, and a model that is spread over ranks fits none of them as a whole.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from slidescale.engine.errors import UserError
from slidescale.engine.parallel.strategy import Strategy

WEIGHTS = "model.safetensors"

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# Tensors begin at multiples of so many bytes, as the library's own files do.
ALIGNMENT = 8


def write_weights(strategy: Strategy, path: Path, metadata: dict[str, str], *, main: bool) -> None:
    """Write all parameters and buffers of a strategy's model; every rank calls it.

    Parameters are put together one at a time, and each is let go once it is written, so a rank needs room for the
    largest one beside what it holds anyway.

    Args:
        metadata: of the file.
        main: whether this rank is the one that writes.
    """
    # Values by the names of the state dict; under ZeRO-3 and FSDP2 they are this rank's shards, of known shape.
    state = strategy.model.state_dict(keep_vars=True)
    if not main:
        for value in state.values():
            _whole(strategy, value)
        return
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name, value in state.items():
        # ZeRO-3 leaves an empty tensor, and the parameter's own shape beside it.
        shape = list(getattr(value, "ds_shape", value.shape))
        size = math.prod(shape) * value.element_size()
        header[name] = {"dtype": DTYPE_NAMES[value.dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for value in state.values():
            whole = _whole(strategy, value).cpu().contiguous()
            file.write(whole.view(-1).view(torch.uint8).numpy().data)


def read_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a file by name, on a device.

    Raises:
        UserError: it is damaged.
    """
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_weights` was told beside the tensors.

    Raises:
        ValueError: the file is cut short, or not of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def _whole(strategy: Strategy, value: Tensor) -> Tensor:
    """Buffers are whole, and alike, on every rank."""
    return strategy.whole(value) if isinstance(value, nn.Parameter) else value.detach()
