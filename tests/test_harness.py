"""Cells of benchmarks: what passes a limit ends, and says so; rows are found again, and only those of this machine."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from support.cells import BENCHMARKS
from support.worlds import PATIENCE_S

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
    time.sleep(100_000)  # whoever waits for it fails the test
"""


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from cells import harness

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
    limits = harness.Limits(2 if status == "out of time" else PATIENCE_S, 400 * 2**20)
    ended = harness.run_world([str(script), *ranks], ranks=2, device="cpu", limits=limits, log=log)
    assert ended.status == status
    assert message in ended.message
    if (waiting := tmp_path / "rank.py.waiting").exists():
        assert not psutil.pid_exists(int(waiting.read_text())), "no rank outlives its world"


def test_rows_are_found_again(harness: ModuleType, tmp_path: Path) -> None:
    path, stamp = tmp_path / "rows.jsonl", {"machine": "this", "commit": "a"}
    from cells.rows import Rows

    rows = Rows(path, stamp)
    rows.add({"k": 1, "status": "out of memory"}, {"policy": "keep", "k": 1, "counted": (1, 2)})
    Rows(path, stamp | {"commit": "b"}).add({"k": 2, "status": "ok"}, {"policy": "keep", "k": 2})
    for k, status in ((5, "failed"), (6, "not run")):
        rows.add({"k": k, "status": status}, {"policy": "keep", "k": k})
    with path.open("a") as file:
        file.write('{"k": 3, "sett')  # the process was ended as it wrote
    again = Rows(path, stamp)
    assert again.find({"policy": "keep", "k": 1, "counted": (1, 2)})["k"] == 1
    assert again.find({"policy": "keep", "k": 2}) is None, "of another commit"
    for k in (5, 6):
        assert again.find({"policy": "keep", "k": k}) is None, "it is tried again"
    again.add({"k": 4, "status": "ok"}, {"policy": "keep", "k": 4})
    assert [json.loads(line)["k"] for line in path.read_text().splitlines()] == [1, 2, 5, 6, 4]


def test_an_ended_sweep_ends_its_ranks(tmp_path: Path) -> None:
    """By SIGTERM, as a scheduler does, or SIGHUP, as a closed terminal does."""
    (tmp_path / "rank.py").write_text(SCRIPT)
    sweep = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from cells import harness; "
        f"from pathlib import Path; harness.run_world([{str(tmp_path / 'rank.py')!r}, 'wait'], ranks=1, device='cpu', "
        f"limits=harness.Limits({PATIENCE_S}, 2**40), log=Path({str(tmp_path / 'log')!r}))"
    )
    waiting = tmp_path / "rank.py.waiting"
    for number in (signal.SIGTERM, signal.SIGHUP):
        waiting.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", sweep])
        deadline = time.monotonic() + PATIENCE_S
        while not (waiting.exists() and waiting.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rank = int(waiting.read_text())
        assert psutil.pid_exists(rank)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 128 + number
        assert not psutil.pid_exists(rank)


def test_a_signal_while_ranks_are_polled_ends_the_sweep(tmp_path: Path) -> None:
    """It comes while Popen holds its lock, which an exception from the handler would never give back."""
    (tmp_path / "rank.py").write_text(SCRIPT)
    sweep = f"""
import os, signal, subprocess, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
from cells import harness

poll = subprocess.Popen.poll

def interrupted(self):
    self._waitpid_lock.acquire()
    os.kill(os.getpid(), signal.SIGTERM)
    self._waitpid_lock.release()
    return poll(self)

subprocess.Popen.poll = interrupted
limits, log = harness.Limits({PATIENCE_S}, 2**40), Path({str(tmp_path / "log")!r})
harness.run_world([{str(tmp_path / "rank.py")!r}, "wait"], ranks=1, device="cpu", limits=limits, log=log)
"""
    done = subprocess.run([sys.executable, "-c", sweep], timeout=PATIENCE_S, check=False)
    assert done.returncode == 128 + signal.SIGTERM


def test_the_machine_is_described(harness: ModuleType) -> None:
    from common.machine import describe_machine, machine_line

    stamp = describe_machine("cpu")
    assert {"machine", "memory_gib", "python", "versions", "commit"} == set(stamp)
    assert f"PyTorch {stamp['versions']['torch']}," in machine_line(stamp)
    assert machine_line(stamp | {"commit": "0123456789abcdef"}).endswith("commit 0123456789ab")
    assert machine_line(stamp | {"commit": "0123456789abcdef-dirty-77"}).endswith("commit 0123456789ab with changes")
    assert sys.version.startswith(stamp["python"])
