"""Which code has made a result."""

import re
import subprocess
from pathlib import Path

import pytest

from slidescale.engine.training import provenance as module
from slidescale.engine.training.provenance import PACKAGES, git_commit, provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout of the code, all of it committed."""
    for name in ("engine/training/provenance.py", "kernels/a.py", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before\n")
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_the_commit_is_marked_when_code_differs_from_it(checkout: Path) -> None:
    clean = git_commit()
    assert clean is not None and re.fullmatch("[0-9a-f]{40}", clean)
    (checkout / "docs" / "page.md").write_text("after\n")
    assert git_commit() == clean, "a page is not code"
    (checkout / "kernels" / "a.py").write_text("after\n")
    changed = git_commit()
    assert changed is not None and re.fullmatch(f"{clean}-dirty-[0-9a-f]{{8}}", changed)
    (checkout / "kernels" / "a.py").write_text("otherwise\n")
    assert git_commit() != changed
    (checkout / "kernels" / "a.py").write_text("after\n")
    assert git_commit() == changed


def test_another_projects_checkout_is_not_taken_for_ones_own(checkout: Path) -> None:
    """As when a virtual environment lies in it."""
    subprocess.run(["git", "rm", "-q", "--cached", "engine/training/provenance.py"], cwd=checkout, check=True)
    assert git_commit() is None


def test_no_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert git_commit() is None


def test_versions_are_of_all_packages() -> None:
    assert provenance()["versions"].keys() == set(PACKAGES)
    assert all(provenance()["versions"].values())
