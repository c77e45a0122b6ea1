"""The sweep over K, as a user runs it: rows, limits, resuming, and no speed of a wrong gradient.

The baselines are held against plain autograd here, too.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
SMALL = ["--encoder", "test_resnet", "--tile", "32", "--device", "cpu", "--dtype", "float32", "--steps", "3"]


def sweep(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/scale_k.py", *SMALL, "--out", str(out), *words]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scale_k.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale_k

    return scale_k


def test_a_sweep_is_right_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, page = tmp_path / "results", tmp_path / "docs" / "page.md"
    words = ["--policy", "recompute", "--baseline", "checkpoint", "frozen", "hub", "--page", str(page)]
    done = sweep(out, "--k", "7", "--ranks", "1", "3", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: single is one process: none at 3 ranks" in done.stdout
    first = rows_of(out)
    assert [(row["policy"], row["ranks"]) for row in first] == [
        ("checkpoint", 1),
        ("frozen", 1),
        ("hub", 3),
        ("recompute", 1),
    ]
    for row in first:
        assert row["status"] == "ok"
        assert row["gradient_error"] <= 1e-4
        # Those that cut the bag add in another order; the others repeat plain autograd's own arithmetic.
        assert row["gradient_error"] > 0 or row["policy"] in ("checkpoint", "frozen"), "not compared with itself"
        assert len(row["steps_s"]) == 3
        assert row["tiles_per_s"] == pytest.approx(7 / row["step_s"])
        assert row["slides_per_h"] == pytest.approx(3600 / row["step_s"])
        assert 0.1 < row["base_gib"] < row["peak_gib"] < 4
        assert 0 < sum(row["shares"].values()) < 1.05
    assert {"machine", "torch", "commit"} <= set(first[0]["stamp"])

    again = sweep(out, "--k", "7", "21", "--ranks", "1", "3", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    rows = rows_of(out)
    assert rows[: len(first)] == first, "what was measured is kept"
    assert [row["k"] for row in rows[len(first) :]] == [21] * 4, "and only what is new is measured"
    assert again.stdout.count("(of before)") == 4
    assert (out / "scale_k.png").stat().st_size > 10_000
    assert "| recompute, single | 21 " in page.read_text(encoding="utf-8")
    assert (page.parent / "scale_k.png").exists()
    board = EventAccumulator(str(out / "tensorboard" / "recompute,single")).Reload()
    assert [event.step for event in board.Scalars("memory/peak_gib")] == [7, 21]


def test_no_speed_is_told_of_a_wrong_gradient(tmp_path: Path) -> None:
    words = ["--k", "40", "80", "--policy", "keep", "--chunk", "16", "--no-page"]
    done = sweep(tmp_path, *words, SLIDESCALE_PLANT_WRONG_GRADIENT="1")
    assert done.returncode == 1
    assert "WRONG GRADIENT: keep, single, K = 40" in done.stderr
    assert " tiles/s\n" not in done.stdout
    for row in rows_of(tmp_path):
        assert row["status"] == ("wrong gradient" if row["k"] == 40 else "not run")
        assert row["step_s"] is row["tiles_per_s"] is row["slides_per_h"] is None
        assert "shares" not in row and "steps_s" not in row
    assert rows_of(tmp_path)[0]["gradient_error"] > 0.1


def test_out_of_memory_and_time_are_rows(tmp_path: Path) -> None:
    """Plain autograd stops at the limit, and the larger K after it are not tried."""
    words = ["--k", "2", "4000", "8000", "--policy", "--baseline", "plain", "--tile", "64", "--no-page"]
    done = sweep(tmp_path, *words, "--memory-limit", "1200MiB")
    assert done.returncode == 0, done.stdout + done.stderr
    few, many, more = rows_of(tmp_path)
    assert (few["status"], many["status"], more["status"]) == ("ok", "out of memory", "not run")
    assert "may 1.17 GiB" in many["message"]
    assert more["message"] == "out of memory at K = 4,000"
    assert "**out of memory**" in done.stdout


def test_wrong_settings_are_told(
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
