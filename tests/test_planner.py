"""A plan uses the room that there is, and a step takes what the plan says."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from slidescale.engine.config import PolicyName
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.devices import find_device
from slidescale.engine.memory.estimate import largest_k, step_flops, step_seconds
from slidescale.engine.memory.footprint import Curve, Footprint
from slidescale.engine.memory.needs import Job
from slidescale.engine.memory.planner import Plan, choose, sizes_to_measure
from slidescale.engine.memory.policies import POLICIES, Policy
from slidescale.engine.strategies.held import Holding, model_state
from slidescale.engine.units import GIB, MIB, parse_size

from support.footprints import footprint
from support.grids import full

# ---- (a) the plan against a process

STEP = """
import json, sys
request = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
sys.path.insert(0, request["tests"])
from slidescale.engine.memory.usage import GIB, held_bytes, peak_gib, return_freed_memory
assert return_freed_memory()
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.parallel.tile_parallel import TileGroup
from support.footprints import make
from slidescale.engine.models.dropout import Draw, drawing_for
k, chunk = request["k"], request["chunk"]
model = make(request["name"], 224, bf16=request["bf16"])
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()
base = held_bytes(torch.device("cpu"))
tiles = torch.randint(0, 256, (k, 224, 224, 3), dtype=torch.uint8)
for step in range(2):
    chunks = Chunks(tiles, chunk, -(-k // chunk), step, 0)
    encoded = encode(model, chunks, request["stored"])
    with drawing_for(Draw(step, 0, k)):
        logits, _ = model.aggregate(encoded.features, torch.zeros(k, 2), TileGroup())
    torch.nn.functional.cross_entropy(logits[None], torch.tensor([1])).backward()
    backpropagate(model, chunks, encoded, lambda loss: loss.backward())
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps({"base": base, "peak": peak_gib(torch.device("cpu")) * GIB}))
"""


@pytest.mark.parametrize(
    ("name", "bf16", "k", "chunk", "stored"),
    [
        ("resnet18", True, 128, 16, 8),
        *full(
            ("vit_tiny_patch16_224", False, 64, 64, 0),
            ("resnet18", True, 128, 128, 0),
            ("resnet18", True, 192, 16, 8),
            ("vit_tiny_patch16_224", True, 80, 16, 5),
            ("resnet10t", False, 128, 16, 7),
        ),
    ],
)
def test_peak_of_a_process(name: str, bf16: bool, k: int, chunk: int, stored: int) -> None:
    request = {
        "name": name,
        "bf16": bf16,
        "k": k,
        "chunk": chunk,
        "stored": stored,
        "tests": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", STEP, json.dumps(request)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    measured_footprint = footprint(name, 224, bf16=bf16, chunk=chunk, bag=k)
    update = model_state(measured_footprint, Holding()).update
    need = Job(footprint=measured_footprint, prefetch=0, update=update).need(k, chunk, stored)
    step = measured["peak"] - measured["base"]
    print(
        f"{name} K={k}: step predicted / measured {need.total / step:.3f}, "
        f"peak {(measured['base'] + need.total) / measured['peak']:.3f}, step {step / GIB:.2f} GiB"
    )
    assert step > measured["base"], "the step dominates, or the comparison proves nothing"
    assert measured["base"] + need.total == pytest.approx(measured["peak"], rel=0.10)


# ---- (b) choosing


def sketch(flavour: str = "cuda", ranks: int = 1) -> Footprint:
    """A made-up encoder: 1 MiB weights' copies a graph and 10 MiB a tile."""

    def line(fixed: int, tile: int) -> Curve:
        return Curve((1, 128), ((fixed + tile) * MIB, (fixed + 128 * tile) * MIB))

    return Footprint(
        flavour=flavour,
        tile_bytes=3 * 224**2,
        dim=512,
        parameters=10 * MIB,
        trained=10 * MIB,
        block=MIB,
        outside=MIB,
        largest=MIB,
        forward=line(2, 2),
        building=line(1, 11),
        graph=line(1, 10),
        backward=line(2, 12),
        storage=line(0, 1),
        ranks=ranks,
        aggregator=Curve((ranks, 1000 * ranks), (MIB, 20 * MIB)),
        flops=1e9,
        backward_flops=2e9,
        aggregator_flops=Curve((ranks, 1000 * ranks), (10**6, 10**9)),
        traffic=1e8,
    )


def plan(budget: int, *, k: int = 1000, ranks: int = 1, **settings: object) -> Plan:
    return choose(Job(footprint=sketch(ranks=ranks)), k=k, budget=budget, base=GIB, **settings)  # type: ignore[arg-type]


def test_more_memory_stores_more() -> None:
    plans = []
    for budget in range(GIB + 200 * MIB, 14 * GIB, 100 * MIB):
        plans.append(plan(budget))
        assert plans[-1].peak <= budget and not plans[-1].warning
    tiles = [min(1000, each.stored * each.chunk) for each in plans]
    assert tiles == sorted(tiles)
    assert tiles[0] == 0 and tiles[-1] == 1000 and len(set(tiles)) > 10


def test_ends_are_keep_and_recompute() -> None:
    rich, keep = plan(100 * GIB), plan(100 * GIB, policy="keep")
    assert (rich.chunk, rich.stored, rich.need) == (keep.chunk, keep.stored, keep.need)
    assert rich.stored == rich.chunks == rich.stored_chunks(1000)
    one = plan(GIB, policy="recompute", chunk=32).peak  # of the chunk sizes that are fast, the smallest
    poor, recompute = plan(one), plan(one, policy="recompute")
    assert poor.chunk == recompute.chunk == 32 and poor.need.total == recompute.need.total and recompute.stored == 0
    # The last chunk of pass 1 is the first that pass 2 needs: its graph takes the room that any chunk's will.
    assert poor.stored == poor.stored_chunks(1000) == 1


def test_stored_chunks_of_each_bag_fit() -> None:
    made = plan(4 * GIB, k=4000, ranks=4)
    assert made.stored_chunks(4000) == made.stored > 0
    for k in (1, 3, 4, 63, 257, 1001, 3999):
        stored = made.stored_chunks(k)
        assert made.base + made.job.need(k, made.chunk, stored).total <= made.budget
        most = -(-made.job.local(k) // made.chunk)
        assert stored == most or made.job.need(k, made.chunk, stored + 1).total > made.budget - made.base


def test_fixed_settings_are_honoured_and_misfits_told() -> None:
    kept = plan(4 * GIB, policy="keep", chunk=32)
    assert (kept.chunk, kept.stored) == (32, 32)
    assert (
        "policy keep with chunks of 32 tiles needs" in kept.warning
        and "more than the budget of 4.00 GiB" in kept.warning
    )
    assert plan(100 * GIB, chunk=24).chunk == 24
    away = plan(4 * GIB, policy="offload")
    assert not away.warning and away.need.away > 9 * GIB and away.need.graphs == 0


@pytest.mark.parametrize("flavour", ["cpu", "cuda"])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("chunk", [1, 16, 128])
@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
def test_more_tiles_never_need_less(policy: str, chunk: int, ranks: int, flavour: str) -> None:
    job = Job(footprint=sketch(flavour, ranks), update=GIB)
    needs = []
    for k in range(1, 600):
        stored = 0 if policy == "recompute" else -(-job.local(k) // chunk)
        needs.append(job.need(k, chunk, stored, away=policy == "offload").total)
    assert needs == sorted(needs) and needs[-1] > needs[0]


def test_offloaded_graphs_leave_their_room() -> None:
    job = Job(footprint=sketch())
    kept, away = (job.need(1000, 16, 63, away=offload) for offload in (False, True))
    assert away.away == 62 * (1 + 16 * 10) * MIB + (1 + 8 * 10) * MIB and kept.away == 0
    assert kept.total - away.total > 0.9 * away.away
    on_disk = Job(footprint=sketch("cpu")).need(1000, 16, 63, away=True)
    assert on_disk.away == away.away and on_disk.host == 0 < away.host


@pytest.mark.parametrize(
    ("k", "update", "part"),
    [(5, 0, "activations"), (1000, 0, "features and aggregator"), (1000, 5 * GIB, "gradient reduction and update")],
)
def test_what_cannot_fit_says_by_how_much(k: int, update: int, part: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"of {k} tiles does not fit: .* more than the budget of 1.00 GiB$"
    ) as caught:
        choose(Job(footprint=sketch(), update=update), k=k, budget=GIB, base=GIB)
    step, parts = re.search(r"the step needs (\S+ [GM]iB) .* at a time \((.*)\),", str(caught.value)).groups()  # type: ignore[union-attr]
    assert part in parts
    total = sum(parse_size(each.split(" of ")[0], "part") for each in parts.split(", "))
    assert total == pytest.approx(parse_size(step, "step"), rel=0.01)


def test_largest_k_is_the_largest() -> None:
    job = Job(footprint=sketch(ranks=4))
    for policy in ("keep", "recompute", "offload"):
        k = largest_k(job, room=2 * GIB, policy=POLICIES[policy], chunk=16)  # type: ignore[index]
        stored: Callable[[int], int] = lambda k, p=policy: 0 if p == "recompute" else -(-job.local(k) // 16)  # noqa: E731
        assert k % 4 == 0 and k > 100
        assert job.need(k, 16, stored(k), away=policy == "offload").total <= 2 * GIB
        assert job.need(k + 4, 16, stored(k + 4), away=policy == "offload").total > 2 * GIB


def test_recomputing_costs_a_forward() -> None:
    keep, again = (plan(100 * GIB, policy=policy) for policy in ("keep", "recompute"))
    assert step_flops(again) == pytest.approx(4 / 3 * step_flops(keep), rel=1e-3)


def test_offload_waits_for_its_transfers() -> None:
    device = find_device("A100-40GB")
    keep, away = (plan(100 * GIB, policy=policy) for policy in ("keep", "offload"))
    moved = 2 * away.need.away / (0.7 * 32e9)
    assert step_seconds(away, device, bf16=True) == moved > step_seconds(keep, device, bf16=True)


def test_every_policy_has_its_name() -> None:
    assert set(POLICIES) == set(get_args(PolicyName))
    assert all(name == policy.name for name, policy in POLICIES.items())


def test_a_policy_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Policy):
        name = "half"  # type: ignore[assignment]

        def stored(self, chunks: int, fits: Callable[[int], bool]) -> int:
            return chunks // 2

    monkeypatch.setitem(POLICIES, "half", Half())  # type: ignore[misc]
    made = plan(100 * GIB, policy="half", chunk=16)
    assert (made.chunks, made.stored, made.again, made.stored_chunks(320)) == (63, 31, 32, 10)
    keep, recompute = (plan(100 * GIB, policy=policy, chunk=16) for policy in ("keep", "recompute"))
    assert recompute.peak < made.peak < keep.peak and not made.warning


def test_sizes_to_measure_are_two_or_more() -> None:
    assert sizes_to_measure(1, "auto", "cuda") == ([1, 2], [1, 1024])
    assert sizes_to_measure(5000, "auto", "cuda") == ([1, 32, 128], [1, 1024, 5000])
    assert sizes_to_measure(5000, 24, "cpu") == ([1, 6, 24], [1, 1024, 5000])
    assert sizes_to_measure(5000, "auto", "cuda", ranks=400) == ([1, 4, 16], [1, 5000, 409600])


def test_model_state_of_each_strategy() -> None:
    p = 4 * 10 * MIB
    for strategy, expected in (("single", 4 * p), ("ddp", 4 * p), ("zero0", 4 * p), ("zero1", 2 * p + 3 * p // 4)):
        ranks = 1 if strategy == "single" else 4
        assert model_state(sketch(), Holding(strategy=strategy, shards=ranks)).base == expected  # type: ignore[arg-type]
    offloaded = model_state(sketch(), Holding(strategy="zero2", shards=4, offload_optimizer=True))
    assert offloaded.base == 2 * p and offloaded.host == 5 * p // 4
    assert model_state(sketch("cpu"), Holding(strategy="zero2", shards=4, offload_optimizer=True)).host == 0
    sharded = model_state(sketch(), Holding(strategy="fsdp", shards=4))
    assert model_state(sketch(), Holding(optimizer="sgd")).base == 3 * p, "momentum has p"
    cut = model_state(sketch(), Holding(strategy="zero3", shards=4, reduce_bucket=MIB, max_live=2 * MIB))
    assert (cut.buffers, cut.parameters) == (4 * MIB, 8 * MIB + p // 4)
    assert sharded.base == p // 4 + 3 * 4 * MIB + p + p // 4 + p // 2, "shard, blocks, gradients, their shard, moments"
