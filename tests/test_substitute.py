"""Attributes of libraries that are replaced for a while."""

from pathlib import Path

import pytest

from slidescale.engine.process.substitute import substitute


class Library:
    @staticmethod
    def answer() -> int:
        return 1


class Derived(Library):
    pass


def test_an_attribute_is_back_afterwards() -> None:
    with substitute(Library, "answer", staticmethod(lambda: 2)):
        assert Library.answer() == Derived().answer() == 2
    assert Library.answer() == 1
    with pytest.raises(ZeroDivisionError), substitute(Library, "answer", staticmethod(lambda: 1 // 0)):
        Library.answer()
    assert Library.answer() == Library().answer() == 1, "and is a static method still"


@pytest.mark.parametrize(("owner", "name"), [(Library, "question"), (Derived, "answer")])
def test_what_is_not_there_is_not_replaced(owner: type, name: str) -> None:
    """Another version of a library may have renamed it: in silence, nothing would be replaced."""
    with pytest.raises(AttributeError, match=f"has no attribute '{name}' of its own"), substitute(owner, name, None):
        pass


def test_no_product_code_uses_mocks() -> None:
    """They are for tests; product code replaces what it has checked to be there."""
    root = Path(__file__).parent.parent
    files = [path for folder in ("engine", "kernels", "recipes") for path in (root / folder).rglob("*.py")]
    assert len(files) > 90
    assert [path for path in files if "unittest" in path.read_text()] == []
