"""Cells of benchmarks: what passes a limit ends, and says so; rows are found again, and only those of this machine."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

ROOT = Path(__file__).parent.parent

# What a rank does, by its number.
SCRIPT = """
import os, sys, time
what = sys.argv[1:][int(os.environ["RANK"])]
if what == "grow":
    held = []
    while True:
        held.append(bytearray(b"x" * 20_000_000))
        time.sleep(0.02)
if what == "raise":
    raise ValueError("no such encoder")
if what == "full":
    print("15 GiB do not fit", file=sys.stderr)
    sys.exit(77)
if what == "wait":
    with open(sys.argv[0] + ".waiting", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import harness

    return harness


@pytest.mark.parametrize(
    ("ranks", "status", "message"),
    [
        (["fine", "fine"], "ok", ""),
        (["wait", "grow"], "out of memory", "rank 1 held 4"),
        (["wait", "full"], "out of memory", "rank 1: 15 GiB do not fit"),
        (["wait", "raise"], "failed", "rank 1 ended with 1: ValueError: no such encoder"),
        (["fine", "wait"], "out of time", "not ready after 2 s"),
    ],
)
def test_how_worlds_end(harness: ModuleType, ranks: list[str], status: str, message: str, tmp_path: Path) -> None:
    script, log = tmp_path / "rank.py", tmp_path / "logs" / "cell.log"
    script.write_text(SCRIPT)
    limits = harness.Limits(2 if status == "out of time" else 60, 400 * 2**20)
    begin = time.monotonic()
    ended = harness.run_world([str(script), *ranks], ranks=2, device="cpu", limits=limits, log=log)
    assert ended.status == status
    assert message in ended.message
    assert time.monotonic() - begin < 60, "a rank that waits is not waited for"
    if (waiting := tmp_path / "rank.py.waiting").exists():
        assert not psutil.pid_exists(int(waiting.read_text())), "no rank outlives its world"


def test_rows_are_found_again(harness: ModuleType, tmp_path: Path) -> None:
    path, stamp = tmp_path / "rows.jsonl", {"machine": "this", "commit": "a"}
    rows = harness.Rows(path, stamp)
    rows.add({"k": 1}, {"policy": "keep", "k": 1})
    harness.Rows(path, stamp | {"commit": "b"}).add({"k": 2}, {"policy": "keep", "k": 2})
    with path.open("a") as file:
        file.write('{"k": 3, "sett')  # the process was ended as it wrote
    again = harness.Rows(path, stamp)
    assert again.find({"policy": "keep", "k": 1})["k"] == 1
    assert again.find({"policy": "keep", "k": 2}) is None, "of another commit"
    again.add({"k": 4}, {"policy": "keep", "k": 4})
    assert [json.loads(line)["k"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_the_machine_is_told(harness: ModuleType) -> None:
    stamp = harness.describe_machine("cpu")
    assert {"machine", "memory_gib", "python", "torch", "deepspeed", "timm", "commit"} <= set(stamp)
    assert stamp["torch"] in harness.tell_machine(stamp)
    assert sys.version.startswith(stamp["python"])
