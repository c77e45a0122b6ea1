"""What ranks say to each other is counted right: against arithmetic, and against what the system saw a rank write."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from slidescale.engine.parallel.rank_group import RankGroup
from slidescale.engine.parallel.tile_parallel import TileGroup

from support.cells import BENCHMARKS, run_in_kept_worlds
from support.equivalence import Case, make_model, make_step, mesh_for, train
from support.memory_slides import BAG_SIZES
from support.worlds import World

STEPS = len(BAG_SIZES)
# What gloo writes beside the payload: a header a message, and as many messages as ranks in a ring, twice.
HEADER_BYTES = 1_000


@dataclass(frozen=True)
class Counted:
    """Of an epoch, a step a bag.

    Attributes:
        calls: (operation, payload, wire) by phase.
        written: bytes that this process wrote to files and sockets meanwhile.
        shapes: of all parameters, all of which train, by name.
    """

    calls: dict[str, list[tuple[str, int, float]]]
    written: int
    shapes: dict[str, tuple[int, ...]]

    def payload(self, phase: str, operation: str) -> int:
        return sum(size for name, size, _ in self.calls.get(phase, []) if name == operation)


def communication() -> ModuleType:
    """The benchmark's module; a rank has no other way to it."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return import_module("cells.communication")


def written() -> int:
    """Bytes that this process has written so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])


def count(_: TileGroup, case: Case, fault: bool = False) -> Counted:
    """An epoch's; with `fault`, calls inside of a backward are not noted."""
    mesh, model = mesh_for(case), make_model(case)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    made = make_step(case, model, mesh)
    counter = communication().Communication()
    if fault:
        note = counter._note
        counter._note = lambda *call: note(*call) if torch._C._current_graph_task_id() == -1 else None
    made.train_step.stopwatch = communication().CountingStopwatch(mesh.device, counter)
    dist.barrier()
    before = written()
    with counter:
        train(case, made)
    seen = written() - before
    dist.barrier()
    calls = {
        phase: [(call.operation, call.payload, call.wire) for call in calls] for phase, calls in counter.calls().items()
    }
    return Counted(calls, seen, shapes)


def numbers(shapes: dict[str, tuple[int, ...]], part: str = "", *, multiple: int = 1, rows: int = 1) -> int:
    """Of the parameters of a part, with each one's padded to a multiple, or with its rows padded to one."""
    total = 0
    for name, shape in shapes.items():
        if name.startswith(part):
            padded = [math.ceil(shape[0] / rows) * rows, *shape[1:]]
            total += math.ceil(math.prod(padded) / multiple) * multiple
    assert total > 0, f"no parameter's name begins with {part!r}"
    return total


def expected_bytes(strategy: str, ranks: int, counted: Counted) -> dict[tuple[str, str], int]:
    """An epoch's payload of gathers and reductions, by phase and operation, each in fp32."""
    shapes = counted.shapes
    every, chunks = 4 * numbers(shapes), sum(TileGroup(0, ranks).chunk_count(k, 2) for k in BAG_SIZES)
    if strategy in ("ddp", "zero0"):
        return {("reduction", "all-reduce"): STEPS * every}
    if strategy in ("zero1", "zero2"):
        # Both all-reduce, though a rank needs no more than its part. Parts begin at even numbers.
        halves = [numbers(shapes, part) for part in ("encoder", "aggregator")]
        flat = sum(4 * math.ceil(half / (2 * ranks)) * 2 * ranks for half in halves)
        return {("reduction", "all-reduce"): STEPS * every, ("optimizer", "all-gather"): STEPS * flat}
    if strategy == "zero3":
        encoder, aggregator = (4 * numbers(shapes, part, multiple=ranks) for part in ("encoder", "aggregator"))
        return {
            ("pass 1", "all-gather"): chunks * encoder,
            ("aggregate", "all-gather"): 2 * STEPS * aggregator,  # forward and backward
            ("pass 2", "all-gather"): 2 * chunks * encoder,
            ("reduction", "reduce-scatter"): STEPS * (encoder + aggregator),
        }
    encoder, aggregator = (4 * numbers(shapes, part, rows=ranks) for part in ("encoder", "aggregator"))
    found = {("pass 2", "reduce-scatter"): STEPS * (encoder + aggregator)}
    if strategy == "fsdp+hold":
        return found | {
            ("pass 1", "all-gather"): STEPS * encoder,
            ("aggregate", "all-gather"): STEPS * aggregator,
            ("pass 2", "all-gather"): 0,
        }
    # The aggregator's backward fetches in advance what of the encoder is in no block, which pass 2 then has; and pass 2
    # the aggregator once more. In all, three times each, for each chunk and each step.
    ahead = counted.calls["pass 1"][0][1]
    assert aggregator < ahead < encoder
    return found | {
        ("pass 1", "all-gather"): chunks * encoder,
        ("aggregate", "all-gather"): STEPS * (2 * aggregator + ahead),
        ("pass 2", "all-gather"): 2 * chunks * encoder + STEPS * (aggregator - ahead),
    }


def sent_by_gloo(counted: Counted) -> float:
    """Bytes that a rank should have written: its reduce-scatter is an all-reduce, which sends twice as much."""
    calls = [call for phase in counted.calls.values() for call in phase]
    return sum(wire * (2 if operation == "reduce-scatter" else 1) for operation, _, wire in calls)


def agrees_with_system(counted: Counted) -> bool:
    """Whether the process has written what the count says, and but headers more."""
    messages = sum(len(phase) for phase in counted.calls.values())
    return -messages <= counted.written - sent_by_gloo(counted) <= HEADER_BYTES * messages


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_of_a_strategy_are_what_arithmetic_says(world: Callable[..., World], ranks: int) -> None:
    """By phase; and the system has seen as many go."""
    for strategy in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp", "fsdp+hold"):
        for counted in world(ranks).run(count, Case(strategy=strategy)):
            assert numbers(counted.shapes) > 300_000
            for (phase, operation), size in expected_bytes(strategy, ranks, counted).items():
                assert counted.payload(phase, operation) == size, (strategy, phase, operation)
            assert agrees_with_system(counted), (strategy, counted.written, sent_by_gloo(counted))


def test_merge_takes_d_plus_1_numbers_whatever_k_is(world: Callable[..., World]) -> None:
    """And as many back; and three more for what is told of each tile, its weight."""
    (counted, _) = world(2).run(count, Case(strategy="ddp"))
    dim = 16
    assert len(set(BAG_SIZES)) == STEPS
    merges = [payload for operation, payload, _ in counted.calls["aggregate"] if operation == "all-reduce"]
    assert merges == STEPS * [4, 4, 4, 4 * (dim + 1), 4 * (dim + 1)]


def test_a_count_without_backward_is_found_wrong(world: Callable[..., World]) -> None:
    """By both: what arithmetic says, and what the system saw."""
    for counted in world(2).run(count, Case(strategy="fsdp"), True):
        expected = expected_bytes("fsdp", 2, counted)
        assert any(counted.payload(*where) != size for where, size in expected.items())
        assert not agrees_with_system(counted)


def say_everything(group: TileGroup) -> list[tuple[str, str, int, float, int]]:
    """Each operation once: how it was asked for, and how it was counted, and what this rank wrote meanwhile."""
    ranks, rank = group.size, group.rank
    x = torch.ones(ranks * 60_000)
    whole, part, parts = torch.empty(ranks * len(x)), torch.empty(60_000), list(torch.empty(ranks, len(x)))
    sharded = DTensor.from_local(x, init_device_mesh("cpu", (ranks,)), [Shard(0)])
    world = RankGroup(rank, ranks)
    asks: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(x),
        "backward": lambda: world.sum(torch.ones(len(x), requires_grad=True)).sum().backward(),
        "all_gather_single": lambda: dist.all_gather_single(whole, x),
        "all_gather": lambda: dist.all_gather(parts, x),
        "reduce_scatter_single": lambda: dist.reduce_scatter_single(part, x),
        "broadcast": lambda: dist.broadcast(x, src=0),
        "scatter": lambda: dist.scatter(torch.empty_like(x), parts if rank == 0 else None, src=0),
        "gather": lambda: dist.gather(x, parts if rank == 1 else None, dst=1),
        "send": lambda: dist.send(x, 1) if rank == 0 else dist.recv(x, 0) if rank == 1 else None,
        "objects": lambda: world.gather_objects("." * 4 * len(x)),
        "full_tensor": lambda: sharded.full_tensor(),
        "barrier": lambda: dist.barrier(),
    }
    found = []
    for name, ask in asks.items():
        dist.barrier()
        counter, before = communication().Communication(), written()
        with counter:
            ask()
        seen = written() - before
        counter.lap(name)
        for call in counter.calls()[name]:
            found.append((name, call.operation, call.payload, call.wire, seen))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_operation_is_seen_and_weighed(world: Callable[..., World], ranks: int) -> None:
    """On the rank that sends most, what goes over the wire is what the system saw it write."""
    found = world(ranks).run(say_everything)[0]
    size = 4 * ranks * 60_000
    ring = (ranks - 1) / ranks
    assert [each[:4] for each in found if each[0] != "objects"] == [
        ("all_reduce", "all-reduce", size, 2 * ring * size),
        ("backward", "all-reduce", size, 2 * ring * size),
        ("backward", "all-reduce", size, 2 * ring * size),
        ("all_gather_single", "all-gather", ranks * size, ring * ranks * size),
        ("all_gather", "all-gather", ranks * size, ring * ranks * size),
        ("reduce_scatter_single", "reduce-scatter", size, ring * size),
        ("broadcast", "broadcast", size, size),
        ("scatter", "scatter", ranks * size, ring * ranks * size),
        ("gather", "gather", ranks * size, size),
        ("send", "send", size, size),
        ("full_tensor", "all-gather", ranks * size, ring * ranks * size),
        ("barrier", "barrier", 0, 0),
    ]
    for name in dict.fromkeys(each[0] for each in found):
        sent, seen = sum(each[3] for each in found if each[0] == name), next(e[4] for e in found if e[0] == name)
        if name == "reduce_scatter_single":
            sent *= 2  # gloo's is an all-reduce
        if name == "broadcast":
            sent *= ranks - 1  # and gloo's root sends to each
        assert 0 <= seen - sent < 3 * HEADER_BYTES, name


def test_an_operation_of_unknown_size_is_an_error() -> None:
    """And no hole in the count."""
    with torch.library._scoped_library("deepspeed", "FRAGMENT") as library:
        library.define("speak(Tensor x) -> Tensor")
        library.impl("speak", lambda x: x.clone(), "CPU")
        with (
            communication().Communication(),
            pytest.raises(LookupError, match="deepspeed::speak sends an unknown number"),
        ):
            torch.ops.deepspeed.speak(torch.ones(1))


def test_calls_that_belong_to_no_phase_are_an_error() -> None:
    counter = communication().Communication()
    counter._unclaimed.append(communication().Call("all-reduce", 2, 4))
    with pytest.raises(RuntimeError, match="1 calls after the last lap"):
        counter.calls()
    counter.lap("aggregate")
    assert counter.summary() == {
        "aggregate": [{"operation": "all-reduce", "ranks": 2, "calls": 1, "payload": 4, "wire": 4.0}]
    }


@pytest.fixture
def strategies(monkeypatch: pytest.MonkeyPatch, world: Callable[..., World]) -> ModuleType:
    """The command, whose ranks are processes that are there already."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run_in_kept_worlds(monkeypatch, world, import_module("cells.cell"))
    return import_module("strategies")


def run_strategies(command: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> int:
    """The command, with the smallest encoder; its exit status."""
    small = "--encoder test_resnet --tile 32 --k 8 --dtype float32 --device cpu --out"
    monkeypatch.setattr(sys, "argv", ["strategies.py", *small.split(), str(out), *words])
    return command.main()


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "strategies.jsonl").read_text(encoding="utf-8").splitlines()]


def test_strategies_beside_each_other(strategies: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the command to its page."""
    page = tmp_path / "page.md"
    words = ["--strategy", "ddp", "fsdp", "--merge-k", "20", "--page", str(page)]
    assert run_strategies(strategies, monkeypatch, tmp_path, *words) == 0
    for row in rows_of(tmp_path):
        assert row["step_s"] > 0
        assert 0 < row["gradient_error"] <= row["gradient_bound"]
        assert list(row["communication"]) == ["8", "20"]
    text = page.read_text(encoding="utf-8")
    assert text.count("\n| ddp ") == 5
    assert text.count("\n| fsdp ") == 5
    assert "| 4,321,612 " in text, "the gradients' bytes, four for each of 1,080,403 parameters"


def test_no_speed_of_a_wrong_strategy(
    strategies: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLIDESCALE_PLANT_WRONG_GRADIENT", "1")
    words = ["--strategy", "ddp", "--merge-k", "8", "--no-page"]
    assert run_strategies(strategies, monkeypatch, tmp_path, *words) == 1
    assert "WRONG GRADIENT: ddp, K = 8" in capsys.readouterr().err
    (row,) = rows_of(tmp_path)
    assert row["status"] == "wrong gradient" and row["gradient_error"] > 100 * row["gradient_bound"]
    assert not {"step_s", "steps_s", "tiles_per_s", "slides_per_h", "shares", "communication"} & set(row)


def test_a_merge_that_grows_is_found(strategies: ModuleType) -> None:
    def row(k: int, size: int) -> dict[str, Any]:
        merge = {"operation": "all-reduce", "payload": size}
        gathered = {"operation": "all-gather", "payload": 100 * k}
        return {"strategy": "fsdp", "k": k, "communication": {"aggregate": [merge, gathered]}}

    assert strategies.unequal_merges([row(8, 68), row(16, 68)]) == []
    assert strategies.unequal_merges([row(8, 68), row(16, 136)]) == [
        "fsdp: the merge takes 68 B at K = 8, 136 B at K = 16"
    ]
    assert strategies.unequal_merges([row(8, 0), row(16, 0)]), "a merge that says nothing was not counted"
