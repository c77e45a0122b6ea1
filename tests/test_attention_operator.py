"""Gated attention as an operator: what it keeps, costs and refuses, autocast, and that its tests see faults."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slidescale.kernels import dispatch
from slidescale.kernels.gated_attention import (
    Gate,
    GateDropout,
    gated_attention,
    operator,
    reference,
)

from support.attention import (
    DROPOUT,
    TOLERANCE,
    Problem,
    Results,
    compare,
    make_problem,
    results_of,
    triton_on_cpu,
    worst_error,
)


def test_only_features_and_scores_are_saved() -> None:
    k, dim, width = 1000, 32, 384
    features, *gate = make_problem(k, dim, width, 1).to(torch.float32).inputs
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        gated_attention(features, Gate(*gate))
    grown = {tuple(tensor.shape) for tensor in saved if len(tensor) == k}
    assert grown == {(k, dim), (k, 1)}


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


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "dim", "width", "branches"), [(1000, 100, 100, 3), (20_011, 512, 384, 1)])
def test_gpu_autocast_is_as_exact_as_pytorchs(k: int, dim: int, width: int, branches: int) -> None:
    for kernels in ("triton", "torch"):
        check_autocast(make_problem(k, dim, width, branches), "cuda", kernels)
