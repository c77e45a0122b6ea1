"""Reading a strategy's files without running what they may hold: a pickle can name any function and have it called."""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from slidescale.engine.errors import UserError


def load_state(path: Path | str, device: Any, classes: Sequence[type] = (), *, mmap: bool = False) -> Any:
    """Read a file that `torch.save` wrote, as far as it holds tensors, plain values and instances of `classes`.

    Args:
        device: where tensors go, as `map_location` of `torch.load`.
        mmap: leave the content of tensors in the file until it is looked at.

    Raises:
        UserError: it holds something else, or is damaged.
    """
    with _clear_errors(str(path)), torch.serialization.safe_globals(list(classes)):
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)


class KnownPickle(pickle.Unpickler):
    """Reads a pickle whose functions and classes are all among those that `known` has, by module and name.

    For what `torch.load` does not read: the metadata of PyTorch's distributed checkpoints, a bare pickle.
    """

    def __init__(self, file: IO[bytes], known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        """Look up one of them.

        Raises:
            pickle.UnpicklingError: the pickle names another.
        """
        try:
            return self._known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}") from None


def load_known(path: Path, known: Mapping[tuple[str, str], Any]) -> Any:
    """Read a bare pickle that names nothing but what is `known`, by module and name.

    Raises:
        UserError: it names something else, or is damaged.
    """
    with _clear_errors(str(path)), path.open("rb") as file:
        return KnownPickle(file, known).load()


def load_plain(file: IO[bytes], name: str) -> Any:
    """Read tensors and plain values from an open file, which messages call `name`; see `load_state`."""
    with _clear_errors(name):
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Say in one line why a file could not be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function) (\S+)", str(error))
        what = f"names {found[1]}, which could run anything" if found else "is not a file of tensors and plain values"
        raise UserError(f"{name} {what}: it was not loaded; slidescale did not write it") from None
    except Exception as error:  # of all kinds, for files that are cut short or are something else
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{name} is damaged: {first}") from None
