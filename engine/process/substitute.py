"""An attribute of a library's module or class, replaced for a while."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def substitute(owner: object, name: str, value: object) -> Iterator[None]:
    """Let `owner.name` be `value` while the block runs, in every thread, and what it was afterwards.

    For what a library decides by itself and gives no setting for.

    Args:
        owner: a module or class.

    Raises:
        AttributeError: the owner has no such attribute of its own, as another version of the library may have not.
    """
    if name not in vars(owner):
        raise AttributeError(f"{owner!r} has no attribute {name!r} of its own")
    before = vars(owner)[name]  # not by getattr, which unwraps a static method
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
