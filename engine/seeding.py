"""Seeds derived from names, so that randomness depends on what is drawn and never on who draws it."""

import hashlib


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed for a key such as `(run seed, "bag", epoch, slide_id)`.

    Equal keys give equal seeds in every process, on every machine and in every version of Python (unlike
    `hash`), and different keys give unrelated ones.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
