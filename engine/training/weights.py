"""A model's weights in one file, `model.safetensors`, whatever strategy it was trained under.

The format is that of the safetensors library (https://huggingface.co/docs/safetensors, "Format"), written here because
the library wants all tensors in memory at once, and a model that is spread over ranks fits none of them as a whole.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from slidescale.engine.errors import UserError
from slidescale.engine.files import sync
from slidescale.engine.strategies.strategy import Strategy

WEIGHTS = "model.safetensors"

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Tensors begin at multiples of so many bytes, as the library's own files do.
ALIGNMENT = 8
# Name of the whole file's checksum in its metadata, and the zeros with which it is computed.
DIGEST, NO_DIGEST = "sha256", "0" * 64
BLOCK_BYTES = 2**20


def write_weights(strategy: Strategy, path: Path, metadata: dict[str, str], *, main: bool) -> None:
    """Write all parameters and buffers of a strategy's model, with a checksum; every rank calls it.

    The file is on disk when this returns.

    Parameters are put together one at a time, and each is freed once it is written. So a rank needs room for the
    largest one beside what it holds anyway.

    Args:
        metadata: texts to keep in the file beside the tensors.
        main: whether this rank is the one that writes.
    """
    # Values by the names of the state dict; under ZeRO-3 and FSDP2 they are this rank's shards, of known shape.
    state = strategy.model.state_dict(keep_vars=True)
    if not main:
        for value in state.values():
            _whole(strategy, value)
        return
    header: dict[str, object] = {"__metadata__": metadata | {DIGEST: NO_DIGEST}}
    at = 0
    for name, value in state.items():
        # ZeRO-3 leaves an empty tensor, and the parameter's own shape beside it.
        shape = list(getattr(value, "ds_shape", value.shape))
        size = math.prod(shape) * value.element_size()
        header[name] = {"dtype": DTYPE_NAMES[value.dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    digest = hashlib.sha256(encoded)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for value in state.values():
            whole = _whole(strategy, value).cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(whole.data)
            file.write(whole.data)
        file.seek(8)
        file.write(_with_digest(encoded, NO_DIGEST, digest.hexdigest()))
    sync(path)
    sync(path.parent)


def read_weights(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Read all tensors of a file, by name, onto a device.

    Raises:
        UserError: it is damaged, as its checksum shows where it has one (older versions wrote none).
    """
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    # A checksum under another name is one whose name is damaged.
    digests = [value for value in metadata.values() if len(value) == len(NO_DIGEST)]
    expected = metadata.get(DIGEST, digests[0] if digests else None)
    if expected is not None and _digest(path, expected) != expected:
        raise UserError(f"{path} is damaged: its content is not what was written (its SHA-256 differs)")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata that `write_weights` was given.

    Raises:
        ValueError: the file is cut short, or not of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def _digest(path: Path, expected: str) -> str:
    """The SHA-256 of a file without its length field, and with zeros in place of the expected checksum."""
    with path.open("rb") as file:
        encoded = file.read(int.from_bytes(file.read(8), "little"))
        digest = hashlib.sha256(_with_digest(encoded, expected, NO_DIGEST))
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _with_digest(encoded: bytes, old: str, new: str) -> bytes:
    """A header with another checksum, of the same length."""
    key = f'"{DIGEST}": '
    return encoded.replace(f'{key}"{old}"'.encode(), f'{key}"{new}"'.encode(), 1)


def _whole(strategy: Strategy, value: Tensor) -> Tensor:
    """The whole value of a parameter or buffer; buffers are whole, and alike, on every rank."""
    return strategy.whole(value) if isinstance(value, nn.Parameter) else value.detach()
