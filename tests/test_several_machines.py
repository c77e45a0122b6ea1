"""Two machines: network namespaces with a cable between them, each with a name and an address, as a cluster's hosts.

They share nothing of the network, so whatever one rank tells another goes through that cable. The file system is one,
as docs/several_machines.md asks for.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.launches import PATIENCE_S, ROOT, SMALL, environment, losses

BIN = Path(sys.executable).parent
RENDEZVOUS = "node-a:29500"  # nobody else is in the namespaces, so any port is free


@dataclass(frozen=True)
class Host:
    """One of the two machines."""

    name: str
    namespace: str
    names_file: Path
    """Its /etc/hosts, in which its own name is an address that the other can reach."""

    def inside(self, words: Sequence[str]) -> list[str]:
        """The command that becomes the given one, here."""
        enter = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        uts = ["unshare", "--uts", "sh", "-c", enter, self.name, str(self.names_file)]
        return ["ip", "netns", "exec", self.namespace, *uts, *words]

    def start(self, words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Run a command here."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self.inside(words), cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT
            )

    def kill_all(self) -> int:
        """End whatever runs here, as a loss of power does, and return how many processes that were."""
        pids = [int(pid) for pid in ip("netns", "pids", self.namespace).split()]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)

    def received_mb(self) -> float:
        """Millions of bytes that came in through the cable so far."""
        found = json.loads(ip("-n", self.namespace, "-j", "-s", "link", "show", "eth0"))
        return found[0]["stats64"]["rx"]["bytes"] / 1e6


def ip(*words: str) -> str:
    """Output of iproute2's `ip`; what it complains of is a RuntimeError."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """node-a and node-b, with a cable from eth0 to eth0; skips where this process may not make them."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if missing := [tool for tool in ("ip", "unshare", "hostname", "mount") if shutil.which(tool) is None]:
        pytest.skip(f"two machines in network namespaces need {', '.join(missing)} (apt-get install iproute2)")
    folder = tmp_path_factory.mktemp("hosts")
    names_file = folder / "hosts"
    names_file.write_text("127.0.0.1 localhost\n10.213.7.1 node-a\n10.213.7.2 node-b\n")
    both = [Host(f"node-{x}", f"slidescale-{os.getpid()}-{x}", names_file) for x in "ab"]
    made: list[Host] = []
    try:
        try:
            for host in both:
                ip("netns", "add", host.namespace)
                made.append(host)
            cable = ["type", "veth", "peer", "name", "eth0", "netns", both[1].namespace]
            ip("-n", both[0].namespace, "link", "add", "eth0", *cable)
            for number, host in enumerate(both, start=1):
                ip("-n", host.namespace, "addr", "add", f"10.213.7.{number}/24", "dev", "eth0")
                ip("-n", host.namespace, "link", "set", "eth0", "up")
                ip("-n", host.namespace, "link", "set", "lo", "up")
        except RuntimeError as error:
            pytest.skip(f"no network namespaces here: {error}")
        if both[0].start(["true"], folder / "log").wait(PATIENCE_S):
            pytest.skip(f"no namespace for a machine's name here: {(folder / 'log').read_text().strip()}")
        yield both
    finally:
        for host in made:
            host.kill_all()
            ip("netns", "del", host.namespace)


@pytest.fixture
def hosts(network: list[Host]) -> Iterator[list[Host]]:
    """Both hosts, with nothing running on them before or after the test."""
    yield network
    for host in network:
        host.kill_all()


@pytest.fixture(scope="module")
def recipe(demo_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The recipe's words for a run of some name; all runs are in one folder, and look for tissue once."""
    out = tmp_path_factory.mktemp("runs")

    def words(name: str, *extra: str, epochs: int = 1) -> list[str]:
        where = ["--data.manifest", str(demo_manifest), "--run.out", str(out), "--run.name", name]
        return ["recipes/egfr.py", *where, *SMALL, "--run.epochs", str(epochs), *extra]

    return words


def run_folder(words: list[str]) -> Path:
    return Path(words[words.index("--run.out") + 1]) / words[words.index("--run.name") + 1]


@pytest.fixture(scope="module")
def alone(network: list[Host], recipe: Callable[..., list[str]]) -> list[float]:
    """Losses of one process on one machine; where there is no network, nobody waits for them."""
    words = recipe("alone")
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), check=True, timeout=PATIENCE_S)
    found = losses(run_folder(words))
    assert len(found) > 6 and max(found) / min(found) > 1.05, "enough losses, and not all one"
    return found


def by_torchrun(hosts: list[Host], words: list[str], logs: list[Path]) -> list[subprocess.Popen[bytes]]:
    """The same command on each host."""
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", RENDEZVOUS]
    command = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", *meet, *words]
    return [host.start(command, log) for host, log in zip(hosts, logs, strict=True)]


def by_deepspeed(hosts: list[Host], words: list[str], logs: list[Path]) -> list[subprocess.Popen[bytes]]:
    """DeepSpeed's launcher without ssh: its command on each host, with the host's number."""
    hostfile = logs[0].with_name("hostfile")
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    address, port = RENDEZVOUS.split(":")
    launcher = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh"]
    launcher += ["--master_addr", address, "--master_port", port]
    return [
        host.start([*launcher, "--node_rank", str(number), *words, "--deepspeed_config", "ds.json"], log)
        for number, (host, log) in enumerate(zip(hosts, logs, strict=True))
    ]


def by_slurm(hosts: list[Host], words: list[str], logs: list[Path]) -> list[subprocess.Popen[bytes]]:
    """docs/slurm.sh as sbatch runs it on the first host, with stand-ins for srun and scontrol."""
    tools = logs[0].with_name("slurm")
    tools.mkdir()
    tasks = [
        f'{shlex.join(host.inside([]))} "$@" >{shlex.quote(str(log))} 2>&1 &'
        for host, log in zip(hosts, logs, strict=True)
    ]
    srun = ["#!/bin/bash", "while [[ $1 == --* ]]; do shift; done", *tasks, "wait -n && wait -n"]
    scontrol = ["#!/bin/sh", f"printf '%s\\n' {' '.join(host.name for host in hosts)}"]
    for name, lines in (("srun", srun), ("scontrol", scontrol)):
        (tools / name).write_text("\n".join(lines) + "\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_JOB_ID": "12345678", "SLURM_GPUS_ON_NODE": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    with logs[0].with_name("job").open("wb") as file:
        script = ["bash", str(ROOT / "docs" / "slurm.sh"), *words, "--parallel.strategy", "fsdp"]
        return [subprocess.Popen(script, env=environment() | job, stdout=file, stderr=subprocess.STDOUT)]


@pytest.mark.full
@pytest.mark.parametrize(("launch", "strategy"), [(by_slurm, "fsdp"), (by_deepspeed, "zero2")])
def test_two_machines_train_as_one_process_does(
    launch: Callable[..., list[subprocess.Popen[bytes]]],
    strategy: str,
    hosts: list[Host],
    recipe: Callable[..., list[str]],
    alone: list[float],
    tmp_path: Path,
) -> None:
    """A rank on each of two hosts: the losses of one process, step by step, and each line of output once."""
    words = recipe(strategy)
    logs = [tmp_path / host.name for host in hosts]
    before_mb = [host.received_mb() for host in hosts]
    launchers = launch(hosts, words, logs)
    deadline = time.monotonic() + PATIENCE_S
    codes = [launcher.wait(max(1, deadline - time.monotonic())) for launcher in launchers]
    output = "".join(log.read_text() for log in sorted(tmp_path.glob("*")) if log.is_file())
    assert set(codes) == {0}, output
    for once in (f"run .*{strategy} on 2 × cpu", f"fp32, {strategy}", "epoch  1/1", "results in"):
        assert len(re.findall(once, output)) == 1, output
    # Adam turns rounding into steps where a gradient is near zero, so the two drift apart, slowly.
    assert losses(run_folder(words)) == pytest.approx(alone, rel=1e-3)
    for host, before in zip(hosts, before_mb, strict=True):
        # The other host's part in the gradient of the half of 1.0 M parameters that is this rank's to update.
        assert host.received_mb() - before > 2.0 * len(alone), "gradients came through the cable"


@pytest.mark.full
def test_losing_a_machine_ends_the_run(hosts: list[Host], recipe: Callable[..., list[str]], tmp_path: Path) -> None:
    """All processes of a host die at once: the other host's launcher ends, with an error, and leaves none behind."""
    words = recipe("lost", epochs=1000)
    logs = [tmp_path / host.name for host in hosts]
    kept, lost = by_torchrun(hosts, words, logs)
    deadline = time.monotonic() + PATIENCE_S
    while not any("epoch  1/1000" in log.read_text() for log in logs):
        assert kept.poll() is None and lost.poll() is None, logs[0].read_text() + logs[1].read_text()
        assert time.monotonic() < deadline, logs[0].read_text() + logs[1].read_text()
        time.sleep(0.5)
    assert hosts[1].kill_all() >= 2, "the launcher and its rank"
    assert lost.wait(PATIENCE_S) == -signal.SIGKILL
    assert kept.wait(PATIENCE_S) > 0
    assert not ip("netns", "pids", hosts[0].namespace).split(), "its rank has ended too"
