"""The end of a command before its time: Ctrl-C, a scheduler's signal, a launcher that is gone."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slidescale.engine.commands import recipe as main
from slidescale.engine.data.cohort import Cohort
from slidescale.engine.process import launcher, stopping
from slidescale.engine.process.stopping import AGAIN, RESUME, listening, note
from slidescale.engine.training.checkpoint import Checkpoints
from slidescale.engine.training.trainer import Trainer

from support.runs import make_config
from support.worlds import free_port

BIN = Path(sys.executable).parent
# Whatever takes so long hangs.
PATIENCE_S = 1500

# Ranks that meet, and then wait for each other for ever in a collective, where no Python code runs.
SCRIPT = """
import os, sys
from pathlib import Path
from slidescale.engine.process.stopping import listening, note
with listening():
    import torch
    from slidescale.engine.parallel.mesh import start_world
    start_world(torch.device("cpu"))
    import torch.distributed as dist
    dist.barrier()
    note("in epoch 3", "with advice")
    there = Path(sys.argv[-1]) / f"{os.environ['RANK']}.unfinished"
    there.write_text(str(os.getpid()))
    there.rename(there.with_suffix(".pid"))
    dist.recv(torch.zeros(1), 1 - int(os.environ["RANK"]))
"""
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port"],
}


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """Also where the tests run in the background, whose processes a shell begins deaf to Ctrl-C."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_until(what: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """One that has ended, and that nobody has asked for its status, does not run."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("name", "whom", "number"),
    [
        ("torchrun", "outermost", signal.SIGUSR1),  # which it does not expect: it is gone at once
        ("deepspeed", "outermost", signal.SIGTERM),  # likewise, and the launcher that it has started goes on
        pytest.param("torchrun", "outermost", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("torchrun", "outermost", signal.SIGINT, marks=pytest.mark.full),
        pytest.param("torchrun", "outermost", signal.SIGKILL, marks=pytest.mark.full),
        pytest.param("deepspeed", "outermost", signal.SIGKILL, marks=pytest.mark.full),
        pytest.param("deepspeed", "innermost", signal.SIGKILL, marks=pytest.mark.full),
        pytest.param("deepspeed", "innermost", signal.SIGTERM, marks=pytest.mark.full),
    ],
)
def test_ranks_end_with_their_launcher(name: str, whom: str, number: signal.Signals, tmp_path: Path) -> None:
    script, log = tmp_path / "rank.py", tmp_path / "log"
    script.write_text(SCRIPT)
    port = [str(free_port())] if name == "deepspeed" else []
    words = [str(BIN / LAUNCHERS[name][0]), *LAUNCHERS[name][1:], *port, str(script), str(tmp_path)]
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *words], env=environment, stdout=file, stderr=subprocess.STDOUT)
    family = [process.pid]
    try:
        files = [tmp_path / f"{rank}.pid" for rank in range(2)]
        wait_until(lambda: all(file.exists() for file in files) or process.poll() is not None, log)
        assert process.poll() is None, log.read_text()
        ranks = [int(file.read_text()) for file in files]
        family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert set(ranks) <= set(family)
        os.kill(process.pid if whom == "outermost" else psutil.Process(ranks[0]).ppid(), number)
        wait_until(lambda: not any(map(is_running, ranks)), log)
        process.wait(PATIENCE_S)
        wait_until(lambda: not any(map(is_running, family)), log)
    finally:
        for pid in family:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
    output = log.read_text()
    assert output.count("stopped in epoch 3; with advice") == 1, output
    assert "Traceback" not in output.split("stopped in epoch 3")[0], output


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python3 /bin/torchrun --nproc-per-node 2 x.py", True),
        ("/venv/bin/python3.11 -m torch.distributed.run x.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info=x x.py", True),
        ("python /venv/bin/deepspeed x.py", True),
        ("python recipes/egfr.py --run.name torchrun", False),
        ("bash -c torchrun x.py", False),
        ("timeout 60 torchrun x.py", False),
        ("python -m pytest torchrun", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_command_line(line: str, expected: bool) -> None:
    assert launcher._is_launcher(line.split()) is expected


def test_only_a_launchers_process_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert launcher.find_launchers() == ()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher.find_launchers() == (), "set by hand, in a shell that may end before its processes"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launcher.find_launchers() == (os.getppid(),)
    assert not launcher.is_lost(launcher.find_launchers())
    assert not launcher.is_lost(())
    assert launcher.is_lost((os.getppid(), os.getpid()))


class Exited(BaseException):
    """In place of the process's end."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses that the process would have ended with."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        if threading.current_thread() is threading.main_thread():
            raise Exited

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(stopping, "_ending", threading.Lock())
    monkeypatch.setattr(stopping, "GRACE_S", 1e6)  # the main thread always comes first, however slow
    return codes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_one_line_and_the_status_of_a_signal(
    number: signal.Signals, exits: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def work() -> None:
        note("in epoch 3", RESUME)
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            note("while unwinding", "")
            raise RuntimeError("Connection closed by peer") from None  # of a rank that was stopped first

    with pytest.raises(Exited), listening():
        work()
    assert exits == [128 + number]
    assert capsys.readouterr().err == "stopped in epoch 3; to go on, give the same command with --resume\n"
    assert signal.getsignal(number) == before


def test_ignored_signals_stay_ignored(exits: list[int]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with listening():
            signal.raise_signal(signal.SIGHUP)
        assert not exits
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_of_libraries_are_not_taken_for_the_end(exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "GRACE_S", 0.0)
    handled = threading.Event()
    before = signal.signal(signal.SIGCHLD, lambda *_: handled.set())
    try:
        with listening():
            signal.raise_signal(signal.SIGCHLD)
            time.sleep(0.1)  # for the watch to do what it must not; none of it is waited for
        assert handled.is_set() and not exits
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_other_ranks_are_silent(
    exits: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Exited), listening():
        signal.raise_signal(signal.SIGINT)
    assert exits == [130] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("where", "method", "call", "expected"),
    [
        (Cohort, "tile", 1, f"stopped before the first epoch; {AGAIN}"),
        (Checkpoints, "save", 1, f"stopped in epoch 1; {AGAIN}"),
        (Trainer, "_train_epoch", 2, f"stopped in epoch 2; {RESUME}"),
    ],
)
def test_training_says_how_to_go_on(
    where: type,
    method: str,
    call: int,
    expected: str,
    exits: list[int],
    demo_manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, calls = getattr(where, method), []

    def stop(*args: Any, **settings: Any) -> Any:
        calls.append(method)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **settings)

    monkeypatch.setattr(where, method, stop)
    with pytest.raises(Exited), main.command():
        main.run(make_config(demo_manifest, tmp_path, epochs=2))
    assert exits == [130]
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_a_study_is_given_again(exits: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        stopping.keep_advice("give the same command")
        note("in epoch 3", RESUME)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Exited), listening():
        work()
    assert capsys.readouterr().err == "stopped in epoch 3; give the same command\n"
