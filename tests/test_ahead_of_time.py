"""Triton's kernels for real architectures, compiled without a GPU; in processes in which Triton does not emulate."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"}


def run(*words: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


def test_all_forms_fit_and_nothing_spills(tmp_path: Path) -> None:
    """Every kernel, dtype and block size that can be launched; the command fails where one does not fit."""
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    done = run("benchmarks/kernels.py", "--aot", "--out", str(out), "--page", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = json.loads(out.read_text(encoding="utf-8"))
    labels = {each["label"] for each in compiled}
    assert len(compiled) == len(ARCHITECTURES) * len(labels)
    assert {each["architecture"] for each in compiled} == ARCHITECTURES
    assert {label.split()[0] for label in labels} == {
        "pool_block", "score_gradient", "gate_gradient", "features_gradient", "weights_gradient", "prepare_patch",
    }  # fmt: skip
    for each in compiled:
        assert each["spilled"] == 0, each
        assert 0 < each["registers"] <= (512 if each["architecture"].startswith("gfx") else 255), each
        limit = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}.get(each["architecture"], 65_536)
        assert each["shared"] <= limit, each
        assert 0 < each["occupancy"] <= 1, each
    assert "no register spills" in page.read_text(encoding="utf-8")


def test_launches_are_of_these_forms() -> None:
    """As Triton's own launcher works them out; and no form is compiled that is never launched."""
    done = run("tests/launch_forms.py")
    assert done.returncode == 0, done.stderr
    forms = json.loads(done.stdout)
    assert forms["unknown"] == []
    assert forms["unused"] == []
    assert forms["launched"] > 40


def test_spills_and_large_blocks_are_caught() -> None:
    """The judgement itself: a kernel that spills, or wants more shared memory than there is, does not fit."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from ahead_of_time import ARCHITECTURES as LIMITS
    from ahead_of_time import Compiled

    fine = Compiled("kernel", "sm_80", warps=8, registers=255, spilled=0, shared=166_912, occupancy=0.1)
    assert fine.fits
    for name, value in (("spilled", 8), ("shared", 166_913), ("registers", 256)):
        assert not Compiled(**(vars(fine) | {name: value})).fits
    # By NVIDIA's occupancy calculator: 8 warps of 128 registers leave room for two blocks of 64 warps' places.
    assert next(each for each in LIMITS if each.name == "sm_90").occupancy(128, 0, 8) == 16 / 64
    assert next(each for each in LIMITS if each.name == "gfx942").occupancy(128, 32 * 1024, 4) == 8 / 32
