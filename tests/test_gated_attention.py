"""Gated attention pooling: both implementations against its definition in fp64, forward and backward.

Without a GPU, Triton emulates its kernels on the CPU: right in fp32 and fp16, wrong in bf16, which GPUs are to test.
"""

from collections.abc import Callable
from itertools import cycle, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from slidescale.engine.memory.live_bytes import LiveBytes
from slidescale.engine.memory.needs import POOLING_BYTES
from slidescale.kernels.gated_attention import (
    Attended,
    Gate,
    GateDropout,
    blocked,
    gated_attention,
    operator,
    reference,
)
from slidescale.kernels.gated_attention.block_sizes import BlockSizes
from slidescale.kernels.keyed_random import keyed_uniform

from support.attention import DROPOUT, TOLERANCE, Problem, Results, compare, make_problem, results_of, triton_on_cpu
from support.grids import rest_in_full
from support.pairwise import pairwise


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so that what a kernel forgets to write is seen."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """In place of the blocks of GPUs, for speed: emulation costs by the block more than by the number."""
    from slidescale.kernels.gated_attention import backward, forward

    tiles = 16 if request.node.callspec.params["k"] <= 16 else 256
    sizes = BlockSizes(tiles, gate=128, dim=512, warps=1, stages=1)
    for module in (forward, backward):
        for name in ("pool_blocks", "gate_blocks", "product_blocks", "score_blocks"):
            monkeypatch.setattr(module, name, lambda *_, **__: sizes, raising=False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels, as they are launched."""
    from slidescale.kernels.gated_attention import backward, forward

    launched: list[str] = []

    class Spy:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for module, names in (
        (forward, ["pool_block"]),
        (backward, ["score_gradient", "gate_gradient", "features_gradient", "weights_gradient"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Spy(getattr(module, name), name))
    return launched


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("attend", [reference.gated_attention, gated_attention], ids=["reference", "torch"])
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
def test_gradcheck(attend: Callable[..., Attended], branches: int, dropout: GateDropout | None) -> None:
    mask = torch.tensor([True, False, True, True, True, False, True])

    def pooled(features: Tensor, *gate: Tensor) -> tuple[Tensor, Tensor]:
        scores, partial = attend(features, Gate(*gate), mask=mask, dropout=dropout)
        return scores[mask], partial.acc / partial.l[:, None]

    inputs = [tensor.detach().requires_grad_() for tensor in make_problem(7, 5, 3, branches).inputs]
    assert torch.autograd.gradcheck(pooled, inputs)


SIZES = {"dim": (32, 100, 512, 1536), "width": (16, 100, 384), "branches": (1, 3)}
BAGS = {"k": (0, 1, 7, 129, 1000)}
# Every two sizes meet in a few; `make test-full` runs all.
FEW = [tuple(each.values()) for each in pairwise(BAGS | SIZES)]
PROBLEMS = rest_in_full(FEW, [*product(*(BAGS | SIZES).values())])


@triton_on_cpu
@pytest.mark.usefixtures("poison", "few_blocks")
@pytest.mark.parametrize(("k", "dim", "width", "branches"), PROBLEMS)
def test_triton_equals_the_definition(launches: list[str], k: int, dim: int, width: int, branches: int) -> None:
    problem = make_problem(k, dim, width, branches)
    for dtype, tolerance in TOLERANCE.items():
        assert compare(problem, dtype, "triton") <= tolerance
    assert len(launches) == (10 if k else 0), "each kernel ran, for each dtype"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("k", "dim", "width", "branches"), PROBLEMS)
def test_torch_equals_the_definition(k: int, dim: int, width: int, branches: int) -> None:
    problem = make_problem(k, dim, width, branches)
    for dtype, tolerance in TOLERANCE.items():
        assert compare(problem, dtype, "torch") <= tolerance


class Way(NamedTuple):
    """Kernels, and where they run."""

    kernels: str
    device: str

    def inputs(self, problem: Problem, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Gate]:
        features, *gate = problem.to(dtype, self.device).inputs
        return features, Gate(*gate)


# With more than one stretch, and more than one block, of tiles.
@pytest.fixture(
    params=[
        pytest.param(Way("triton", "cpu"), marks=triton_on_cpu, id="triton"),
        pytest.param(Way("torch", "cpu"), id="torch"),
        pytest.param(Way("triton", "cuda"), marks=pytest.mark.gpu, id="gpu-triton"),
        pytest.param(Way("torch", "cuda"), marks=pytest.mark.gpu, id="gpu-torch"),
    ]
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    if request.param.kernels == "triton":
        from slidescale.kernels.gated_attention import backward

        monkeypatch.setattr(backward, "STRETCH", 128)
    for device in blocked.GATE_BYTES:
        monkeypatch.setitem(blocked.GATE_BYTES, device, 64_000)
    monkeypatch.setattr(blocked, "DRAWN_VALUES", 1_000)
    return request.param


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("branches", [1, 20], ids=["1 branch", "20 branches"])
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
def test_several_blocks(way: Way, dropout: GateDropout | None, branches: int, dtype: torch.dtype) -> None:
    problem = make_problem(293, 100, 72, branches)
    assert compare(problem, dtype, *way, dropout=dropout) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("counting", ["some", "none of a block", "none"])
def test_masks(way: Way, counting: str) -> None:
    mask = (torch.rand(293, generator=torch.Generator().manual_seed(0)) < 0.5).to(way.device)
    mask[(128 if counting == "none of a block" else 0 if counting == "none" else 293) :] = False
    problem = make_problem(293, 32, 16, 3)
    assert compare(problem, torch.float32, *way, mask=mask) <= TOLERANCE[torch.float32]
    if counting != "none":
        features, gate = way.inputs(problem)
        masked = gated_attention(features, gate, mask=mask, kernels=way.kernels)
        alone = gated_attention(features[mask], gate, kernels=way.kernels)
        torch.testing.assert_close(masked.pooled, alone.pooled)


@pytest.mark.parametrize(
    ("name", "width"),
    rest_in_full(
        [*zip(["features", *Gate._fields], cycle([10, 16]))], [*product(["features", *Gate._fields], [10, 16])]
    ),
)
def test_inputs_may_lie_anywhere_in_memory(way: Way, name: str, width: int) -> None:
    """A column of a larger matrix, a transposed one, a row that begins at an odd place."""
    features, gate = way.inputs(make_problem(37, 32, width, 3))
    tensors = {"features": features, **gate._asdict()}

    def attend() -> tuple[Tensor, ...]:
        attended = gated_attention(
            tensors["features"], Gate(*(tensors[each] for each in Gate._fields)), kernels=way.kernels
        )
        loss = attended.pooled.square().sum() + attended.scores.square().sum()
        return loss, *torch.autograd.grad(loss, (features, *gate))

    expected, original = attend(), tensors[name]
    odd = torch.cat([original.flatten()[:1], original.flatten()])[1:].view(original.shape)
    spread = torch.stack([original, original], dim=-1)[..., 1]
    turned = original.t().contiguous().t() if original.ndim == 2 else original
    assert not spread.is_contiguous()
    for same in (odd, spread, turned):
        tensors[name] = same
        for ours, theirs in zip(attend(), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_dropout_belongs_to_tiles(way: Way) -> None:
    """A part of the bag, as a rank has it, draws what it would draw in the whole; and other seeds draw otherwise."""
    features, gate = way.inputs(make_problem(293, 32, 16, 1))
    dropout = DROPOUT._replace(p=0.5)

    def scores(rows: slice, **change: int) -> Tensor:
        part = dropout._replace(first_tile=dropout.first_tile + rows.start, **change)
        return gated_attention(features[rows], gate, dropout=part, kernels=way.kernels).scores

    whole = scores(slice(0, 293))
    torch.testing.assert_close(scores(slice(100, 293)), whole[100:], rtol=1e-5, atol=1e-5)
    assert (scores(slice(0, 293), seed=1) - whole).abs().mean() > 0.1
    assert (gated_attention(features, gate, kernels=way.kernels).scores - whole).abs().mean() > 0.1


@triton_on_cpu
@pytest.mark.parametrize(("seed", "first"), [(0, 0), (2**63 - 1, 2**40), (12345, 7)])
def test_triton_draws_the_same_numbers(seed: int, first: int) -> None:
    from support.draw_kernel import draw

    out = torch.empty(16, 64)
    draw[(1,)](out, seed, first, TILES=16, SIZE=64)
    assert torch.equal(out, keyed_uniform(seed, torch.arange(first, first + 16), 64))


def test_equal_inputs_give_equal_bits(way: Way) -> None:
    problem = make_problem(293, 32, 16, 3).to(torch.float32, way.device)

    def once() -> Results:
        return results_of(lambda *inputs: gated_attention(*inputs, dropout=DROPOUT, kernels=way.kernels), problem)

    assert all(torch.equal(first, second) for first, second in zip(once(), once(), strict=True))


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=triton_on_cpu)])
def test_memory_does_not_grow_with_the_gate(
    kernels: str, dropout: GateDropout | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the results, one block's worth however many tiles; less than the planner allows for."""
    forward, backward = operator._implementations(kernels)
    dim, width = (512, 384) if kernels == "torch" else (16, 64)
    few, many = (20_000, 40_000) if kernels == "torch" else (512, 1_024)
    if kernels == "triton":
        monkeypatch.setattr(backward, "STRETCH", 256)
    peaks = []
    for k in (few, many):
        features, *gate = (each.detach() for each in make_problem(k, dim, width, 1).to(torch.float32).inputs)
        weights, biases = torch.cat([gate[0], gate[2]]), torch.cat([gate[1], gate[3]])
        with LiveBytes([features, weights, biases, *gate]) as live:
            scores, partial = forward.forward(features, weights, biases, gate[4], gate[5], None, dropout, torch.float32)
            grads = (torch.ones_like(scores), partial.l, partial.acc)
            results = backward.backward(
                *grads, features, weights, biases, gate[4], scores, partial.m, dropout, torch.float32
            )
        kept = sum(each.nbytes for each in (scores, *partial, *grads, *results))
        peaks.append(live.peak - kept)
    assert peaks[0] <= POOLING_BYTES["cpu"]
    # Scores of a few copies, and partials of blocks, D values for 64 tiles or more; the gate would be 2 L a tile.
    assert (peaks[1] - peaks[0]) / (many - few) < 0.1 * 2 * width * 4


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_operators_keep_pytorchs_rules(way: Way, dropout: float) -> None:
    features, gate = way.inputs(make_problem(5, 8, 4, 2))
    weights, biases = (
        torch.cat(pair).detach().requires_grad_()
        for pair in ((gate.v_weight, gate.u_weight), (gate.v_bias, gate.u_bias))
    )
    settings = (dropout, 3, 7, torch.float32, way.kernels)
    inputs = (features, weights, biases, gate.w_weight, gate.w_bias, None, *settings)
    torch.library.opcheck(torch.ops.slidescale.gated_attention.default, inputs)
    scores, m, l, acc = (each.detach() for each in torch.ops.slidescale.gated_attention(*inputs))
    grads = (torch.ones_like(scores), l, acc)
    saved = (features.detach(), weights.detach(), biases.detach(), gate.w_weight.detach(), scores, m)
    torch.library.opcheck(torch.ops.slidescale.gated_attention_backward.default, (*grads, *saved, *settings))


def test_compiles(way: Way) -> None:
    """Into one graph; then for any number of tiles and any seed, without compiling for each."""
    frames = CompileCounter()

    def attend(features: Tensor, gate: Gate, seed: int) -> Attended:
        return gated_attention(features, gate, dropout=DROPOUT._replace(seed=seed), kernels=way.kernels)

    compiled = torch.compile(attend, fullgraph=True, backend=frames)
    for seed, k in enumerate((37, 41, 53, 61)):
        problem = make_problem(k, 32, 16, 2).to(torch.float32, way.device)
        ours, eager = (
            results_of(lambda *inputs, call=call, seed=seed: call(*inputs, seed), problem)
            for call in (compiled, attend)
        )
        assert all(map(torch.equal, ours, eager))
    assert frames.frame_count <= 2, "the second, at the latest, is for any size"


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "width", "branches"), [*product(*SIZES.values()), (64, 48, 20)])
@pytest.mark.parametrize("k", [0, 1, 7, 129, 1000, 20_011])
def test_gpu_equals_the_definition(launches: list[str], k: int, dim: int, width: int, branches: int) -> None:
    """The emulator's comparisons, compiled; and more than one stretch of tiles."""
    problem = make_problem(k, dim, width, branches)
    for dtype, tolerance in TOLERANCE.items():
        for dropout in (None, DROPOUT):
            assert compare(problem, dtype, "triton", "cuda", dropout=dropout) <= tolerance
            assert compare(problem, dtype, "torch", "cuda", dropout=dropout) <= tolerance
    assert bool(launches) == (k > 0)


@pytest.mark.gpu
def test_gpu_reaches_beyond_32_bits() -> None:
    """K × D of more than 2^31 values: the last tiles are read, and get their gradients, where they are."""
    k, dim, width = 2**31 // 512 + 1_000, 512, 16
    free, needed = torch.cuda.mem_get_info()[0], 5 * k * dim * 2
    if free < needed:
        pytest.skip(f"takes {needed / 1e9:.0f} GB of the GPU's memory, of which {free / 1e9:.0f} GB are free")
    gate = Gate(*(tensor.detach().cuda().bfloat16() for tensor in make_problem(1, dim, width, 1).inputs[1:]))
    features = torch.zeros((k, dim), device="cuda", dtype=torch.bfloat16)
    features[-1_000:] = torch.randn(1_000, dim, device="cuda")
    features.requires_grad_()
    attended = gated_attention(features, gate, kernels="triton")
    attended.partial.acc.sum().backward()
    last = features.detach()[-1_000:].requires_grad_()
    alone = gated_attention(last, gate, kernels="triton")
    torch.testing.assert_close(attended.scores[-1_000:], alone.scores)
    scale = torch.exp(alone.partial.m - attended.partial.m)
    (alone.partial.acc * scale).sum().backward()
    assert features.grad is not None and last.grad is not None
    torch.testing.assert_close(features.grad[-1_000:], last.grad, rtol=2e-2, atol=1e-3)
