"""The sweep over K: rows, limits, resuming, and no speed of a wrong gradient; baselines equal plain autograd.

One sweep runs in processes of its own, as a user runs it; in the others ranks are processes that are there already.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.cells import BENCHMARKS, run_in_kept_worlds
from support.worlds import World

SMALL = ["--encoder", "test_resnet", "--tile", "32", "--device", "cpu", "--dtype", "float32", "--steps", "3"]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scale_k.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale_k

    return scale_k


def test_a_sweep_is_right_and_goes_on_where_it_stopped(
    benchmark: ModuleType,
    world: Callable[..., World],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    from cells import cell

    started = run_in_kept_worlds(monkeypatch, world, cell)
    out, page = tmp_path / "results", tmp_path / "docs" / "page.md"

    def sweep(*ks: str) -> str:
        words = ["--policy", "recompute", "--baseline", "checkpoint", "frozen", "hub", "--page", str(page)]
        monkeypatch.setattr(
            sys, "argv", ["scale_k.py", *SMALL, "--out", str(out), "--k", *ks, "--ranks", "1", "3", *words]
        )
        assert benchmark.main() == 0
        return capsys.readouterr().out

    assert "left out: single is one process: none at 3 ranks" in sweep("7")
    first = rows_of(out)
    assert [(row["policy"], row["ranks"]) for row in first] == [
        ("checkpoint", 1),
        ("frozen", 1),
        ("hub", 3),
        ("recompute", 1),
    ]
    assert len(started) == len(first) + 2, "references are made once: of all parts, and of the aggregator"
    for row in first:
        assert row["status"] == "ok"
        assert row["gradient_error"] <= 1e-4
        # Those that cut the bag add in another order; the others repeat plain autograd's own arithmetic.
        assert row["gradient_error"] > 0 or row["policy"] in ("checkpoint", "frozen"), "not compared with itself"
        assert len(row["steps_s"]) == 3
        assert row["tiles_per_s"] == pytest.approx(7 / row["step_s"])
        assert row["slides_per_h"] == pytest.approx(3600 / row["step_s"])
        assert 0.1 < row["base_gib"] <= row["peak_gib"]
        assert 0 < sum(row["shares"].values()) < 1.05
    assert {"machine", "versions", "commit"} <= set(first[0]["stamp"])

    printed = sweep("7", "21")
    rows = rows_of(out)
    assert rows[: len(first)] == first, "what was measured is kept"
    assert [row["k"] for row in rows[len(first) :]] == [21] * 4, "and only what is new is measured"
    assert printed.count("(measured before)") == 4
    assert len(started) == 2 * len(first) + 2
    assert (out / "scale_k.png").stat().st_size > 10_000
    assert "| recompute, single | 21 " in page.read_text(encoding="utf-8")
    assert (page.parent / "scale_k.png").exists()


def test_no_speed_is_reported_for_a_wrong_gradient(tmp_path: Path) -> None:
    """From the command line, in processes of its own."""
    command = [sys.executable, str(BENCHMARKS / "scale_k.py"), *SMALL, "--out", str(tmp_path), "--no-page"]
    words = ["--k", "40", "80", "--policy", "keep", "--chunk", "16"]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "SLIDESCALE_PLANT_WRONG_GRADIENT": "1"}
    done = subprocess.run([*command, *words], env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG GRADIENT: keep, single, K = 40" in done.stderr
    assert " tiles/s\n" not in done.stdout
    for row in rows_of(tmp_path):
        assert row["status"] == ("wrong gradient" if row["k"] == 40 else "not run")
        assert row["step_s"] is row["tiles_per_s"] is row["slides_per_h"] is None
        assert "shares" not in row and "steps_s" not in row
    assert rows_of(tmp_path)[0]["gradient_error"] > 0.1


def test_out_of_memory_is_a_row(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """A cell stops at the limit, and the larger K after it are not tried."""
    from cells import sweep, sweep_table
    from cells.harness import Ended

    def judge(self: Any, cell: Any, **_: Any) -> tuple[Ended, dict[str, Any]]:
        row = {"gradient_error": 0.0, "peak_gib": 1.0, "base_gib": 0.5, "tile_ranks": 1, "chunk": cell.k}
        speeds = {"step_s": 1.0, "steps_s": [1.0] * 3, "tiles_per_s": 2.0, "slides_per_h": 3600.0}
        return Ended("ok", ""), row | speeds | {"shares": dict.fromkeys(sweep_table.PHASES, 0.1)}

    def measure(cell: Any, *, limits: Any, **_: Any) -> tuple[Ended, dict[str, Any]]:
        asked.append((cell.k, limits.bytes))
        return Ended("out of memory", "rank 0 held 1.2 GiB"), {}

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(sweep.Judge, "judge", judge)
    monkeypatch.setattr(sweep, "measure", measure)
    words = ["--k", "2", "40", "80", "--policy", "--baseline", "plain", "--no-page", "--memory-limit", "1200MiB"]
    monkeypatch.setattr(sys, "argv", ["scale_k.py", *SMALL, "--out", str(tmp_path), *words])
    assert benchmark.main() == 0
    few, many, more = rows_of(tmp_path)
    assert (few["status"], many["status"], more["status"]) == ("ok", "out of memory", "not run")
    assert asked == [(40, 1200 * 2**20)]
    assert more["message"] == "out of memory at K = 40"
    assert "**out of memory**" in capsys.readouterr().out


def test_wrong_settings_are_refused(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for words, message in (
        (["--memory-limit", "6"], "--memory-limit is '6': must be a size such as 8GiB"),
        (["--k", "0"], "must be at least 1"),
        (["--ranks", "2", "--device", "cuda"], "PyTorch sees 1 GPUs here"),
    ):
        monkeypatch.setattr(sys, "argv", ["scale_k.py", *SMALL, *words])
        with pytest.raises(SystemExit) as ended:
            benchmark.parse()
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_change_error_sees_a_half_that_did_not_move(benchmark: ModuleType) -> None:
    from cells.cell import change_error

    start = {"encoder.w": torch.zeros(3), "aggregator.w": torch.zeros(3)}
    end = {"encoder.w": torch.ones(3), "aggregator.w": 100 * torch.ones(3)}
    reference = {"start": start, "end": end}
    assert change_error(end.items(), reference, "all") == 0
    assert change_error((end | {"encoder.w": torch.zeros(3)}).items(), reference, "all") == pytest.approx(1)
    assert change_error((end | {"encoder.w": torch.zeros(3)}).items(), reference, "aggregator") == 0
    assert change_error((end | {"encoder.w": 1.01 * torch.ones(3)}).items(), reference, "all") == pytest.approx(0.01)


@pytest.mark.parametrize(("k", "ranks", "chunk"), [(64, 1, 16), (64, 2, 10), (96, 2, 16), (4, 2, 1)])
def test_what_is_compared_is_in_several_chunks(benchmark: ModuleType, k: int, ranks: int, chunk: int) -> None:
    """Or a fault between chunks would not show; baselines, and a size that the user gave, stay as they are."""
    from cells.judgement import in_chunks
    from cells.ways import Cell

    cell = Cell(
        policy="recompute",
        strategy="ddp",
        ranks=ranks,
        k=k,
        encoder="resnet18",
        tile=96,
        chunk="auto",
        dtype="float32",
        device="cpu",
        steps=3,
    )
    assert in_chunks(cell).chunk == chunk
    assert in_chunks(replace(cell, chunk=7)).chunk == 7
    assert in_chunks(replace(cell, policy="plain")).chunk == "auto"
