"""What a step is predicted to need is what it takes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from slidescale.engine.commands import cli
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory import needs
from slidescale.engine.memory.devices import find_device
from slidescale.engine.memory.estimate import largest_k, step_flops, step_seconds
from slidescale.engine.memory.footprint import Curve, Footprint, measure
from slidescale.engine.memory.live_bytes import LiveBytes
from slidescale.engine.memory.needs import Job
from slidescale.engine.memory.planner import Plan, choose, sizes_to_measure
from slidescale.engine.memory.policies import POLICIES
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.held import Holding, model_state
from slidescale.engine.units import parse_size

GIB = 1024**3
MIB = 1024**2


def make(name: str, tile_px: int, *, bf16: bool, checkpoint_blocks: bool = False) -> SlideModel:
    encoder = Encoder(name, tile_px=tile_px)
    encoder.set_checkpointing(checkpoint_blocks)
    aggregator = Aggregator(encoder.dim, 2, pooling="gated_attention", hidden_dim=512, attention_dim=384, dropout=0.25)
    return SlideModel(encoder, aggregator, autocast=torch.bfloat16 if bf16 else None).train()


@cache
def footprint(name: str, tile_px: int, *, bf16: bool, chunk: int, bag: int) -> Footprint:
    chunks = sorted({1, -(-chunk // 4), chunk})
    return measure(make(name, tile_px, bf16=bf16), blank(tile_px), chunks=chunks, bags=sorted({1, bag}))


def blank(tile_px: int) -> torch.Tensor:
    return torch.zeros((tile_px, tile_px, 3), dtype=torch.uint8)


# ---- (a) the footprint against autograd's own account


def saved_bytes(model: SlideModel, tiles: torch.Tensor) -> int:
    """Bytes of all storages that autograd saves, less parameters, buffers, pixels and the features."""
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model.encode(tiles)
    ours = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), tiles, features)}
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in ours)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "tile_px"), [("test_resnet", 64), ("test_vit", 160), ("test_convnext", 64), ("resnet18", 96)]
)
def test_graph_is_what_autograd_saves(name: str, tile_px: int, bf16: bool) -> None:
    n = 3
    predicted = footprint(name, tile_px, bf16=bf16, chunk=n, bag=1).graph(n)
    tiles = torch.randint(0, 256, (n, tile_px, tile_px, 3), dtype=torch.uint8)
    saved = saved_bytes(make(name, tile_px, bf16=bf16), tiles)
    assert saved > 100_000, "there is something to predict"
    # Scalars and storages of a few bytes, such as random states, are all that may differ.
    assert predicted == pytest.approx(saved, rel=0.01)


def test_checkpointed_blocks_keep_little() -> None:
    plain, checkpointed = (
        measure(make("test_vit", 160, bf16=False, checkpoint_blocks=on), blank(160), chunks=(1, 4), bags=(1,))
        for on in (False, True)
    )
    assert checkpointed.graph(4) < 0.5 * plain.graph(4)
    assert checkpointed.forward(4) == plain.forward(4), "without a graph there is nothing to forget"


def test_attention_and_normalisation_keep_more_on_a_gpu() -> None:
    """CUDA's autocast keeps normalisation in fp32; where there is no GPU its operators are measured all the same."""
    cpu, cuda = (
        measure(make("test_vit", 160, bf16=True), blank(160), chunks=(1, 4), bags=(1,), device=device)
        for device in ("cpu", "cuda")
    )
    assert 1.1 < cuda.graph(4) / cpu.graph(4) < 3
    assert cuda.backward(4) >= cuda.graph(4)


@pytest.mark.parametrize(
    ("k", "chunk", "stored"), [(8, 4, 0), (8, 4, 2), (11, 4, 3), (11, 4, 1), (5, 8, 1), (16, 4, 2)]
)
def test_phases_of_a_step_add_up(k: int, chunk: int, stored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's arithmetic against the engine's own step, storage by storage."""
    name, tile_px = "test_resnet", 96
    measured = footprint(name, tile_px, bf16=False, chunk=chunk, bag=k)
    monkeypatch.setattr(needs, "SCRATCH_SHARE", {"cpu": 0.0})  # what storages do not show
    monkeypatch.setattr(needs, "SCRATCH_BYTES", {"cpu": 0})
    monkeypatch.setattr(needs, "POOLING_BYTES", {"cpu": 0})
    need = Job(footprint=measured, prefetch=0).need(k, chunk, stored)
    model = make(name, tile_px, bf16=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tiles = torch.randint(0, 256, (k, tile_px, tile_px, 3), dtype=torch.uint8)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients, tiles]) as live:
        encoded = encode(model, Chunks(tiles, chunk, -(-k // chunk), seed=0, offset=0), stored)
        with drawing_for(Draw(0, 0, k)):
            logits, _ = model.aggregate(encoded.features, torch.zeros(k, 2), TileGroup())
        logits.sum().backward()
        backpropagate(model, Chunks(tiles, chunk, -(-k // chunk), 0, 0), encoded, lambda loss: loss.backward())
    print(f"k {k} chunk {chunk} stored {stored}: predicted / measured {(need.total - need.pixels) / live.peak:.3f}")
    assert live.peak > 8 * MIB
    assert need.total - need.pixels == pytest.approx(live.peak, rel=0.1)


# ---- (b) the plan against a process

STEP = """
import json, sys
request = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
sys.path.insert(0, request["tests"])
from slidescale.engine.memory.usage import GIB, held_bytes, peak_gib, return_freed_memory
assert return_freed_memory()
from test_planner import Chunks, TileGroup, backpropagate, encode, make
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
        ("resnet18", True, 128, 128, 0),
        ("resnet18", True, 192, 16, 8),
        ("vit_tiny_patch16_224", True, 80, 16, 5),
        ("vit_tiny_patch16_224", False, 64, 64, 0),
        ("resnet10t", False, 128, 16, 7),
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


# ---- (c) choosing


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


def test_frozen_weights_cost_half_a_backward() -> None:
    """Of a matrix product, the backward computes the inputs' gradient, and the weights' where they train."""

    def frozen() -> SlideModel:
        model = make("test_vit", 160, bf16=False)
        for parameter in model.encoder.parameters():
            parameter.requires_grad = parameter.dim() == 1
        return model

    whole, part = (
        measure(model, blank(160), chunks=(1, 2), bags=(1, 2))
        for model in (make("test_vit", 160, bf16=False), frozen())
    )
    assert whole.flops == part.flops > 1e6
    assert 1.8 < whole.backward_flops / whole.flops < 2.3
    assert 0.8 < part.backward_flops / part.flops < 1.4


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


# ---- (d) the command


def test_command_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "--encoder",
        "test_vit",
        "--tile-px",
        "160",
        "--k",
        "5000",
        "--ranks",
        "4",
        "--device",
        "A100-40GB",
    ]
    cli.main([*words, "--json"])
    answer = json.loads(capsys.readouterr().out)
    base = answer["base_bytes"]
    assert base["total"] == base["parameters"] + base["gradients"] + base["optimizer"] + base["buffers"]
    assert answer["peak_bytes"] == base["total"] + answer["step_bytes"]["total"] <= answer["budget_bytes"]
    assert answer["budget_bytes"] == answer["memory_bytes"] - answer["reserve_bytes"]
    assert answer["stored_chunks"] <= answer["chunks"] == -(-1250 // answer["chunk"])
    assert answer["largest_k"]["recompute"] > 5000 and answer["seconds"] > 0
    cli.main(words)
    table = capsys.readouterr().out
    assert "K = 5,000 tiles, 4 ranks, ddp: 1,250 tiles a rank" in table and "peak" in table and "A100-40GB" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "10"], "--memory is missing"),
        (["--k", "0", "--memory", "1GiB"], "--k is 0"),
        (["--k", "10", "--memory", "1XB"], "--memory is '1XB'"),
        (["--k", "10", "--device", "H900"], "must be one of A100-40GB"),
        (["--k", "10", "--memory", "8GiB", "--optimizer-offload"], "--optimizer-offload: single has none"),
        (["--k", "10", "--memory", "8GiB", "--encoder", "resnet1o"], "timm has no model"),
        (["--k", "9000", "--memory", "1.2GiB", "--encoder", "test_vit", "--tile-px", "160"], "does not fit"),
        (["--k", "9000", "--memory", "1.2GiB", "--encoder", "test_vit", "--tile-px", "160"], "a larger --memory"),
        (["--k", "10", "--memory", "1GiB", "--device", "cpu", "--policy", "recompute"], "--memory is 1.00 GiB, of"),
        (["--k", "10", "--memory", "8GiB", "--transformer-layers", "-1"], "--transformer-layers is -1"),
    ],
)
def test_command_tells_errors_in_a_line(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", *words])
    assert str(caught.value).startswith("error: ") and message in str(caught.value)


def test_command_on_a_cpu_offloads_to_files(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--encoder", "test_vit", "--tile-px", "160", "--k", "1", "--memory", "4GiB", "--policy", "offload"]
    cli.main(["plan", *words, "--device", "cpu", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["file_bytes"] == answer["step_bytes"]["away"] > 0 and answer["host_bytes"] == 0
    cli.main(["plan", *words, "--device", "cpu"])
    table = capsys.readouterr().out
    assert "beside it, in files" in table and "on the host" not in table
    assert 1000 < answer["largest_k"]["recompute"] < 4 * GIB / (160 * 160 * 3), "pixels alone would fill it"
