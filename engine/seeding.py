"""Seeds derived from names, so that randomness depends on what is drawn and never on who draws it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed for a key such as `(run seed, "bag", epoch, slide_id)`.

    Equal keys give equal seeds in every process, on every machine and in every version of Python (unlike
    `hash`), and different keys give unrelated ones.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(device: torch.device, *key: int | str) -> Iterator[None]:
    """Draw torch's random numbers on the CPU and `device` from a key, and put the generators back afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(derive_seed(*key))
        yield
