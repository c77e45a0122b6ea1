"""A file of an encoder's weights: read without running code, unwrapped, and named as timm names them."""

import argparse
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from slidescale.engine.errors import ConfigError, first_line

# Names under which trainers keep weights beside other things, in the order in which they are taken: averages of the
# weights, the teacher of DINO and DINOv2 (which these publish), and then the weights as they were trained.
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "teacher",
    "state_dict",
    "model_state_dict",
    "model",
    "student",
    "encoder",
    "net",
)
# Classes that trainers keep beside tensors and that hold values only: their command line, paths, and NumPy's numbers,
# which older versions of NumPy name otherwise.
_NUMBER = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    PosixPath,
    np.dtype,
    _NUMBER,
    (_NUMBER, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
]
SHOWN = 3


def read_weight_file(path: Path, expected: Collection[str]) -> dict[str, Tensor]:
    """Read the weights in a file.

    Dictionaries such as {"state_dict": …} are unwrapped, and one prefix is removed, such as DINO's "backbone.",
    Lightning's "model.encoder." or DistributedDataParallel's "module."; what lies outside the prefix is left out.

    Args:
        path: a .safetensors file, or one that `torch.save` has written.
        expected: names of the network's own tensors. A file that has them under other names, for timm to translate,
            keeps its own.

    Raises:
        ConfigError: the file is not there, empty, cut short, a pointer or a page in place of the file, or would run
            code; it holds no tensors, values that are not finite, or two networks that fit alike.
    """
    content = _read(path)
    states = dict(_states(content))
    if not states:
        raise ConfigError(f"model.weights: {path} holds no tensors by name{_keys_of(content)}")
    best = max(states, key=lambda wrapper: (bool(_best_prefix(states[wrapper], expected, path)), -_rank(wrapper)))
    state = states[best]
    prefix = _best_prefix(state, expected, path)
    if prefix:
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ConfigError(f"model.weights: {path} has values that are not finite (NaN or infinite), in {name}")
    return state


def own_names(state: dict[str, Tensor], expected: Collection[str]) -> str:
    """Name a few of a file's tensors that the network does not have, in words."""
    foreign = [name for name in state if name not in expected] or list(state)
    return f"the file has {', '.join(foreign[:SHOWN])}{' …' if len(foreign) > SHOWN else ''}"


def _read(path: Path) -> Any:
    """Read whatever the file holds.

    Raises:
        ConfigError: it holds nothing that can be used.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ConfigError(f"model.weights: cannot read {path}: {error.strerror or error}") from None
    if wrong := _what_it_is_instead(head):
        raise ConfigError(f"model.weights: {path} {wrong}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch says so where a pickle asks for a function or class, and of a broken file that an operand is unknown.
        if any(f"unsupported {what}" in str(error).lower() for what in ("global", "class")):
            raise ConfigError(
                f"model.weights: {path} is a pickle of more than tensors, which would run code as it is read: save "
                "its state dict alone, by torch.save(model.state_dict(), FILE)"
            ) from None
        raise ConfigError(f"model.weights: {path} {_DAMAGED} ({first_line(error)})") from None
    except (SafetensorError, EOFError, RuntimeError, ValueError, KeyError, OSError, AttributeError) as error:
        raise ConfigError(f"model.weights: {path} {_DAMAGED} ({first_line(error)})") from None


_DAMAGED = "is cut short or damaged, or not a file of weights: fetch it again"


def _what_it_is_instead(head: bytes) -> str | None:
    if not head:
        return "is empty: fetch it again"
    start = head.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS and not the file itself: fetch that with `git lfs pull`, or from the hub"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a page of the web and not the file itself (perhaps one that asks to log in): fetch it again"
    if start.startswith(b"{"):
        return "is text (JSON), not weights"
    return None


def _states(content: Any, wrapper: str = "", depth: int = 2) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every state dict in what a file holds, by the name of what it is wrapped in."""
    if not isinstance(content, dict):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield wrapper, clean_state_dict(tensors)
    if depth:
        for name, value in content.items():
            if isinstance(value, dict):
                yield from _states(value, wrapper or str(name), depth - 1)


def _rank(wrapper: str) -> int:
    return WRAPPERS.index(wrapper) if wrapper in WRAPPERS else len(WRAPPERS) * (wrapper != "")


def _best_prefix(state: dict[str, Tensor], expected: Collection[str], path: Path) -> str | None:
    """The prefix under which a file has the network's names, "" for none; None where it has none of these names.

    Raises:
        ConfigError: it has the whole network under two.
    """
    found: dict[str, int] = {}
    for name in state:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in expected:
                prefix = "".join(f"{part}." for part in parts[:cut])
                found[prefix] = found.get(prefix, 0) + 1
    if not found:
        return None
    most = max(found.values())
    alike = [prefix for prefix, count in found.items() if count == most]
    if "" in alike:
        return ""
    teachers = [prefix for prefix in alike if "teacher" in prefix or "ema" in prefix]
    if len(alike) > 1 and len(teachers) != 1:
        raise ConfigError(
            f"model.weights: {path} has the network more than once, under {' and '.join(sorted(alike))}: save the one "
            "that is meant in a file of its own"
        )
    return teachers[0] if len(alike) > 1 else alike[0]


def _keys_of(content: Any) -> str:
    if isinstance(content, dict):
        names = [str(name) for name in content]
        return f": the file has {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}" if names else ""
    return f": it is a {type(content).__name__}"
