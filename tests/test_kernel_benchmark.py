"""The kernels' benchmark: Triton's kernels fit real architectures, and no speed is reported for wrong results.

Tests that compile run in processes in which Triton does not emulate.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from slidescale.kernels.gated_attention import Attended, gated_attention
from slidescale.kernels.tile_prep import prepare_tiles

from support.cells import BENCHMARKS

ROOT = BENCHMARKS.parent
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"}


def run(*words: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


KERNELS = {
    "pool_block",
    "score_gradient",
    "gate_gradient",
    "features_gradient",
    "weights_gradient",
    "prepare_patch",
}
# A form of each kernel, by turns the first and the last: of fp32, and of 16 bits with all that a form can have.
SOME = """
import dataclasses, json
from kernel_costs.ahead_of_time import all_variants, compile_forms
labels = [each.label for each in all_variants()]
names = [label.split()[0] for label in labels]
first, last = {name: names.index(name) for name in names}, {name: place for place, name in enumerate(names)}
places = [(first, last)[turn % 2][name] for turn, name in enumerate(first)]
print(json.dumps([dataclasses.asdict(each) for each in compile_forms(places)]))
"""


def check_fit(compiled: list[dict[str, Any]]) -> None:
    """All architectures have every form, and nothing spills or takes more than there is."""
    labels = {each["label"] for each in compiled}
    assert len(compiled) == len(ARCHITECTURES) * len(labels)
    assert {each["architecture"] for each in compiled} == ARCHITECTURES
    assert {label.split()[0] for label in labels} == KERNELS
    for each in compiled:
        assert each["spilled"] == 0, each
        assert 0 < each["registers"] <= (512 if each["architecture"].startswith("gfx") else 255), each
        limit = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}.get(each["architecture"], 65_536)
        assert each["shared"] <= limit, each
        assert 0 < each["occupancy"] <= 1, each


def test_each_kernel_fits_and_nothing_spills() -> None:
    done = run("-c", SOME)
    assert done.returncode == 0, done.stdout + done.stderr
    check_fit(json.loads(done.stdout))


@pytest.mark.full
def test_all_forms_fit_and_nothing_spills(tmp_path: Path) -> None:
    """Every kernel, dtype and block size that can be launched, as a user compiles them."""
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    done = run("benchmarks/kernels.py", "--aot", "--out", str(out), "--page", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    check_fit(json.loads(out.read_text(encoding="utf-8")))
    assert "no register spills" in page.read_text(encoding="utf-8")


def test_launches_are_of_these_forms() -> None:
    """As Triton's own launcher works them out; and no form is compiled that is never launched."""
    done = run("tests/support/launch_forms.py")
    assert done.returncode == 0, done.stderr
    forms = json.loads(done.stdout)
    assert forms["unknown"] == []
    assert forms["unused"] == []
    assert forms["launched"] > 40


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # By its path: the package `kernels` of the top level has that name too.
    spec = importlib.util.spec_from_file_location("kernels_benchmark", BENCHMARKS / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_spills_and_large_blocks_are_caught(benchmark: ModuleType) -> None:
    """The judgement itself: a kernel that spills, or wants more shared memory than there is, does not fit."""
    from kernel_costs.ahead_of_time import Compiled
    from kernel_costs.architectures import ARCHITECTURES as TABLE

    fine = Compiled("kernel", "sm_80", warps=8, registers=255, spilled=0, shared=166_912, occupancy=0.1)
    assert fine.fits
    for name, value in (("spilled", 8), ("shared", 166_913), ("registers", 256)):
        assert not Compiled(**(vars(fine) | {name: value})).fits
    limits = {each.name: each for each in TABLE}
    # 8 warps of 128 registers: two blocks in 65,536 registers, of the 64 warps that a multiprocessor holds.
    assert limits["sm_90"].occupancy(128, 0, 8) == 16 / 64
    assert limits["gfx942"].occupancy(128, 32 * 1024, 4) == 8 / 32


@pytest.mark.parametrize("spilled", [0, 8])
def test_the_command_fails_where_a_kernel_does_not_fit(
    benchmark: ModuleType,
    spilled: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    from kernel_costs.ahead_of_time import Compiled

    compiled = [
        Compiled(kernel, name, warps=8, registers=100, spilled=spilled * (name == "sm_90"), shared=1024, occupancy=0.5)
        for kernel in sorted(KERNELS)
        for name in sorted(ARCHITECTURES)
    ]
    monkeypatch.setattr(benchmark, "compile_all", lambda: compiled)
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--aot", "--page", str(page), "--out", str(out)])
    assert benchmark.main() == (1 if spilled else 0)
    verdict = "6 do not fit: features_gradient on sm_90" if spilled else "no register spills, and all fit"
    assert verdict in capsys.readouterr().out and verdict in page.read_text(encoding="utf-8")
    assert [each["fits"] for each in json.loads(out.read_text(encoding="utf-8"))].count(False) == (6 if spilled else 0)


@pytest.mark.parametrize("what", ["attention", "tiles", "nothing"])
def test_no_speed_is_reported_for_wrong_results(
    benchmark: ModuleType, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        scores, partial = gated_attention(*args, **kwargs)
        return Attended(scores, partial._replace(acc=1.0001 * partial.acc))

    from kernel_costs import measured, work

    if what == "attention":
        monkeypatch.setattr(work, "gated_attention", wrong)
    if what == "tiles":
        monkeypatch.setattr(work, "prepare_tiles", lambda *args, **kwargs: 1.0001 * prepare_tiles(*args, **kwargs))
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: (1e9, 1e9))
    monkeypatch.setattr(measured, "measure_memory", lambda *_, **__: 1024)
    page = tmp_path / "page.md"
    words = f"kernels.py --k 300 --dim 32 --width 16 --tiles 2 --tile-px 32 --turns 1 --threads 1 --page {page}"
    monkeypatch.setattr(sys, "argv", words.split())
    assert benchmark.main() == (0 if what == "nothing" else 1)
    printed = capsys.readouterr()
    if what == "nothing":
        assert "| torch " in printed.out and "| torch " in page.read_text(encoding="utf-8")
    else:
        assert printed.out == "" and not page.exists()
        assert f"WRONG RESULTS, no speed is reported: {what}" in printed.err


def test_memory_is_measured_in_a_process_of_its_own(benchmark: ModuleType) -> None:
    """PyTorch keeps the gate's two values of each tile, and makes the features' gradient."""
    from kernel_costs.memory import measure_memory
    from kernel_costs.work import ATTENTION, PYTORCH, Shape

    shape = Shape(k=100_000, dim=32, width=64, branches=1, tiles=1, tile_px=32)
    found = measure_memory(ATTENTION, PYTORCH, shape, dtype="float32", device="cpu", threads=1)
    gate, gradient = 4 * shape.k * 2 * shape.width, 4 * shape.k * shape.dim
    assert gate + gradient < found < 10 * (gate + gradient)


def test_time_is_measured_in_turns(benchmark: ModuleType) -> None:
    from common.timing import measure_seconds

    calls: list[str] = []
    ways = {name: partial(calls.append, name) for name in ("one", "other")}
    found = measure_seconds(ways, 3, clock=lambda way: way() or 2.0)
    assert found == {"one": [2.0] * 3, "other": [2.0] * 3}
    assert calls == ["one", "other"] * 4, "the first turn warms up"
    assert all(seconds > 0 for seconds in measure_seconds(ways, 2)["one"])


def test_a_gpu_is_timed_by_its_own_clock(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, which counts milliseconds."""
    from triton import testing

    from common.timing import gpu_seconds

    monkeypatch.setattr(testing, "do_bench", lambda way, return_mode: 1500.0 if return_mode == "median" else None)
    assert gpu_seconds(print) == 1.5
