"""Gated attention pooling: both implementations against its definition in fp64, forward and backward.

Without a GPU, Triton emulates its kernels on the CPU: right in fp32 and fp16, wrong in bf16, which GPUs are to test.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from slidescale.engine.memory.live_bytes import LiveBytes
from slidescale.engine.memory.needs import POOLING_BYTES
from slidescale.kernels import dispatch
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

triton_on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, its kernels are compiled: -m gpu")

# Sums in fp32 in another order: 1e-6 (measured). Features and weights that are rounded to fp16 exactly as the
# reference's are leave products rounded once on the way back: 5e-4 (measured).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
DROPOUT = GateDropout(p=0.25, seed=0x1234_5678_9ABC_DEF1, first_tile=1_000)


class Problem(NamedTuple):
    """Inputs, and what the gradients of scores, l and acc are; fp64, with values that fp16 has."""

    inputs: list[Tensor]
    grads: tuple[Tensor, Tensor, Tensor]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        inputs = [tensor.detach().to(device, dtype).requires_grad_() for tensor in self.inputs]
        accumulation = torch.promote_types(dtype, torch.float32)
        return Problem(inputs, tuple(grad.to(device, accumulation) for grad in self.grads))


def make_problem(k: int, dim: int, width: int, branches: int) -> Problem:
    generator = torch.Generator().manual_seed(k + dim + width + branches)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).half().double()

    gate = Gate(
        draw(width, dim, scale=dim**-0.5),
        draw(width, scale=0.1),
        draw(width, dim, scale=dim**-0.5),
        draw(width, scale=0.1),
        draw(branches, width, scale=3 * width**-0.5),
        draw(branches),
    )
    # Features as ReLU leaves them, and upstream gradients of one sign: a score's gradient is a sum over D, and would
    # else vanish for some tile by chance, where any rounding is large. The scores have other uses too, as a loss on the
    # attention's entropy would be one.
    grads = (draw(k, branches).abs(), draw(branches).abs(), draw(branches, dim, scale=dim**-0.5).abs())
    return Problem([draw(k, dim).abs(), *gate], grads)


Results = list[Tensor]


def results_of(attend: Callable[..., Attended], problem: Problem) -> Results:
    """Scores, m, l, acc, and the gradients of all inputs."""
    features, *gate = problem.inputs
    scores, partial = attend(features, Gate(*gate))
    finite = torch.where(scores.isinf(), 0, scores)  # of tiles that do not count
    grads = torch.autograd.grad((finite, partial.l, partial.acc), problem.inputs, problem.grads)
    return [tensor.detach() for tensor in (finite, *partial, *grads)]


def worst_error(results: Results, expected: Results) -> float:
    """Largest relative error, of a whole tensor; any that is not finite counts as infinite."""
    errors = [0.0]
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shape == theirs.shape
        size = theirs[~theirs.isinf()].norm().clamp_min(1e-6)
        error = torch.where(ours.double() == theirs, 0, ours.double() - theirs).norm() / size
        errors.append(float(error.nan_to_num(nan=torch.inf)))
    return max(errors)


def compare(problem: Problem, dtype: torch.dtype, kernels: str, device: str = "cpu", **options: Any) -> float:
    def attend(features: Tensor, gate: Gate) -> Attended:
        return gated_attention(features, gate, kernels=kernels, **options)

    def define(features: Tensor, gate: Gate) -> Attended:
        return reference.gated_attention(features, gate, **options)

    expected = results_of(define, problem.to(torch.float64, device))
    has_tiles = bool(expected[1].isfinite().all())
    assert bool(expected[3].norm() > 0) == has_tiles, "there is something to compare"
    return worst_error(results_of(attend, problem.to(dtype, device)), expected)


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


SIZES = [(dim, width, branches) for dim in (32, 100, 512, 1536) for width in (16, 100, 384) for branches in (1, 3)]


@triton_on_cpu
@pytest.mark.usefixtures("poison", "few_blocks")
@pytest.mark.parametrize(("dim", "width", "branches"), SIZES)
@pytest.mark.parametrize("k", [0, 1, 7, 129, 1000])
def test_triton_equals_the_definition(launches: list[str], k: int, dim: int, width: int, branches: int) -> None:
    problem = make_problem(k, dim, width, branches)
    for dtype, tolerance in TOLERANCE.items():
        assert compare(problem, dtype, "triton") <= tolerance
    assert len(launches) == (10 if k else 0), "each kernel ran, for each dtype"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("dim", "width", "branches"), SIZES)
@pytest.mark.parametrize("k", [0, 1, 7, 129, 1000])
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


@pytest.mark.parametrize("name", ["features", *Gate._fields])
@pytest.mark.parametrize("width", [10, 16])
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


def test_only_features_and_scores_are_saved() -> None:
    k, dim, width = 1000, 32, 384
    features, *gate = make_problem(k, dim, width, 1).to(torch.float32).inputs
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        gated_attention(features, Gate(*gate))
    grown = {tuple(tensor.shape) for tensor in saved if len(tensor) == k}
    assert grown == {(k, dim), (k, 1)}


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


PLANTED = [
    # The tail of the last block of tiles counts, with features of zero.
    ("forward", "counts = tl.load(mask + rows, row_in, 0) != 0", "counts = tl.load(mask + rows, row_in, 1) != 0"),
    # The tail of D: a feature's last columns are left out of the gate.
    ("forward", "for start in range(0, dim, BLOCK_D):", "for start in range(0, dim - BLOCK_D + 1, BLOCK_D):"),
    # Dropout by place in this rank's tiles, not in the bag.
    ("forward", "draw_uniform(seed, first_tile + rows", "draw_uniform(seed, rows"),
    # The second stretch of tiles takes the first one's scores.
    ("backward", "s = tl.load(scores + rows * branches", "s = tl.load(scores + local * branches"),
    # Each split starts from nothing, and forgets earlier stretches.
    ("backward", "d = tl.load(at, inside, 0.0)", "d = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)"),
]


@triton_on_cpu
@pytest.mark.parametrize(("name", "right", "wrong"), PLANTED, ids=[wrong for _, _, wrong in PLANTED])
def test_planted_bugs_are_caught(
    name: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slidescale.kernels.gated_attention import backward, forward

    modules: dict[str, ModuleType] = {"forward": forward, "backward": backward}
    source = Path(str(modules[name].__file__)).read_text(encoding="utf-8")
    assert right in source
    broken = tmp_path / f"broken_{name}.py"
    broken.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(broken.stem, broken)
    assert spec is not None and spec.loader is not None
    modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(modules[name])
    monkeypatch.setattr(modules["backward"], "STRETCH", 128)
    monkeypatch.setattr(operator, "_implementations", lambda _: (modules["forward"], modules["backward"]))
    problem = make_problem(293, 48, 32, 2)
    assert compare(problem, torch.float32, "triton", dropout=DROPOUT) > 100 * TOLERANCE[torch.float32]


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


def autocast_errors(problem: Problem, device: str, kernels: str) -> tuple[Results, list[tuple[float, float]]]:
    """What comes out under bf16 autocast, and each error beside that of PyTorch's own operators."""
    expected = results_of(reference.gated_attention, problem.to(torch.float64, device))
    inputs = problem.to(torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = results_of(lambda *each: gated_attention(*each, kernels=kernels), inputs)
        theirs = results_of(reference.gated_attention, inputs)
    errors = [
        (worst_error([mine], [right]), worst_error([eager], [right]))
        for mine, eager, right in zip(ours, theirs, expected, strict=True)
    ]
    return ours, errors


def check_autocast(problem: Problem, device: str, kernels: str) -> None:
    ours, errors = autocast_errors(problem, device, kernels)
    assert all(tensor.dtype == torch.float32 for tensor in ours), "the parameters' gradients are not rounded"
    assert max(eager for _, eager in errors) > 1e-4, "autocast is really on"
    for mine, eager in errors:
        assert mine <= 2 * eager + 1e-6, errors


def test_autocast_is_as_exact_as_pytorchs() -> None:
    check_autocast(make_problem(1000, 100, 100, 3), "cpu", "torch")


def test_flops_are_known() -> None:
    """The planner counts them: the two passes of matrix products, and what recomputing the gate adds."""
    k, dim, width, branches = 50, 32, 16, 3
    features, *gate = make_problem(k, dim, width, branches).to(torch.float32).inputs
    with FlopCounterMode(display=False) as counter:
        attended = gated_attention(features, Gate(*gate))
    forward = counter.get_total_flops()
    assert forward == 2 * k * (2 * width * dim + branches * width + branches * dim)
    with FlopCounterMode(display=False) as counter:
        attended.pooled.sum().backward()
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.1)


def test_arguments_that_do_not_fit() -> None:
    features, *gate = make_problem(5, 8, 4, 2).to(torch.float32).inputs
    with pytest.raises(ValueError, match=r"u_weight is \[4, 8\] and must be \[4, 7\]"):
        gated_attention(features[:, :7], Gate(gate[0][:, :7], *gate[1:]))
    with pytest.raises(ValueError, match=r"mask is torch.float32 \[5\] and must be bool \[5\]"):
        gated_attention(features, Gate(*gate), mask=torch.ones(5))
    with pytest.raises(ValueError, match="two dimensions"):
        gated_attention(features[0], Gate(*gate))
    with pytest.raises(ValueError, match="dropout's p is 1.0"):
        gated_attention(features, Gate(*gate), dropout=GateDropout(1.0, 0, 0))
    with pytest.raises(ValueError, match="kernels is 'auto'"):
        gated_attention(features, Gate(*gate), kernels="auto")


def test_kernels_that_cannot_run_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    features, *gate = make_problem(5, 8, 4, 2).to(torch.float64).inputs
    monkeypatch.setattr(dispatch, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="need an NVIDIA or AMD GPU"):
        gated_attention(features, Gate(*gate), kernels="triton")
    with pytest.raises(ValueError, match="need an NVIDIA or AMD GPU"):
        dispatch.choose_kernels("triton", torch.device("cpu"))
    assert dispatch.choose_kernels("auto", torch.device("cpu")) == "torch"
    for capability, expected in (((7, 5), "torch"), ((8, 0), "triton"), ((10, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert dispatch.choose_kernels("auto", torch.device("cuda")) == expected
    monkeypatch.setattr(dispatch, "is_interpreted", lambda: True)
    with pytest.raises(ValueError, match="not float64"):
        gated_attention(features, Gate(*gate), kernels="triton")
    monkeypatch.setattr(dispatch, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="not installed"):
        dispatch.choose_kernels("triton", torch.device("cuda"))


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "width", "branches"), [*SIZES, (64, 48, 20)])
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
@pytest.mark.parametrize(("k", "dim", "width", "branches"), [(1000, 100, 100, 3), (20_011, 512, 384, 1)])
def test_gpu_autocast_is_as_exact_as_pytorchs(k: int, dim: int, width: int, branches: int) -> None:
    for kernels in ("triton", "torch"):
        check_autocast(make_problem(k, dim, width, branches), "cuda", kernels)


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
