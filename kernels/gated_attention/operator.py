"""Gated attention pooling as an operator of PyTorch's, so that autograd, autocast and torch.compile know it.

Two operators, forward and backward, each with two implementations: "triton" (`forward.py`, `backward.py`) and "torch"
(`blocked.py`). For the backward they save the features, the scores and their maximum, and no `[K, L]`.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from slidescale.kernels.dispatch import KernelName, check_name, check_triton
from slidescale.kernels.gated_attention import blocked
from slidescale.kernels.gated_attention.reference import Attended, Gate, GateDropout, Partial

# Features in fp32 are read as they are by kernels that compute in 16 bits, so that they are pooled as they are.
MIXED = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}


def gated_attention(
    features: Tensor,
    gate: Gate,
    *,
    mask: Tensor | None = None,
    dropout: GateDropout | None = None,
    kernels: KernelName = "torch",
) -> Attended:
    """Pool tiles by gated attention: what `reference.py` defines, without a `[K, L]` in memory.

    The gate's matrix products run in autocast's dtype where autocast is on (which leaves doubles alone), else in the
    wider of the features' and V's; all sums are in fp32, or fp64 for doubles. Under fp16, scale the loss, as for
    PyTorch's own operators: the gate's gradient is rounded to it. Equal inputs give equal bits. Differentiable once.

    Args:
        features: `[K, D]`, K ≥ 0.
        gate: its parameters.
        mask: bool `[K]`, True for tiles that count; the others' features must be finite too; None: all count.
        dropout: on the gate; None: nothing is dropped.
        kernels: "triton" or "torch" (see `choose_kernels`).

    Raises:
        ValueError: shapes that do not fit, or kernels that cannot run on the features' device or dtype.
    """
    check_name(kernels)
    _check(features, gate, mask, dropout)
    device = features.device.type
    dtype = torch.promote_types(features.dtype, gate.v_weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if (features.dtype, dtype) not in MIXED:
        features = features.to(dtype)
    with torch.autocast(device, enabled=False):  # which would round the weights, and their gradients, before their time
        weights = torch.cat([gate.v_weight, gate.u_weight])
        biases = torch.cat([gate.v_bias, gate.u_bias])
    p, seed, first_tile = dropout or (0.0, 0, 0)
    scores, m, l, acc = torch.ops.slidescale.gated_attention(
        features.contiguous(),
        weights,
        biases,
        gate.w_weight.contiguous(),
        gate.w_bias.contiguous(),
        mask,
        p,
        seed,
        first_tile,
        dtype,
        kernels,
    )
    return Attended(scores, Partial(m.detach(), l, acc))


def _check(features: Tensor, gate: Gate, mask: Tensor | None, dropout: GateDropout | None) -> None:
    if features.ndim != 2 or gate.v_weight.ndim != 2 or gate.w_weight.ndim != 2:
        raise ValueError(
            f"features {list(features.shape)}, V {list(gate.v_weight.shape)} and w {list(gate.w_weight.shape)} must "
            "have two dimensions: [K, D], [L, D] and [B, L]"
        )
    (k, dim), width, branches = features.shape, len(gate.v_weight), len(gate.w_weight)
    expected = Gate((width, dim), (width,), (width, dim), (width,), (branches, width), (branches,))  # type: ignore[arg-type]
    for name, tensor, shape in zip(Gate._fields, gate, expected, strict=True):
        if tensor.device != features.device:
            raise ValueError(f"{name} is on {tensor.device}, and features on {features.device}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} and must be {list(shape)}, for features [{k}, {dim}], a gate of width "
                f"{width} and {branches} branches"
            )
    if dropout is not None and not 0 < dropout.p < 1:
        raise ValueError(f"dropout's p is {dropout.p}: it must be above 0 and below 1; None is for none")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (k,)):
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)} and must be bool [{k}]")
    if mask is not None and mask.device != features.device:
        raise ValueError(f"mask is on {mask.device}, and features on {features.device}")


def _implementations(kernels: str) -> tuple[ModuleType, ModuleType]:
    """The modules with the forward and the backward."""
    if kernels == "torch":
        return blocked, blocked
    # Triton is not installed everywhere, and is slow to import.
    from slidescale.kernels.gated_attention import backward, forward

    return forward, backward


@torch.library.custom_op("slidescale::gated_attention", mutates_args=())
def _forward(
    features: Tensor,
    weights: Tensor,
    biases: Tensor,
    w_weight: Tensor,
    w_bias: Tensor,
    mask: Tensor | None,
    p: float,
    seed: int,
    first_tile: int,
    dtype: torch.dtype,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores `[K, B]`, m `[B]`, l `[B]` and acc `[B, D]`, in at least fp32.

    Args:
        features: `[K, D]`, contiguous.
        weights: `[2 L, D]`, V above U; biases: `[2 L]`, likewise.
        w_weight: `[B, L]`; w_bias: `[B]`.
        p, seed, first_tile: dropout; p = 0: none.
        dtype: of the gate's matrix products.
    """
    if kernels == "triton":
        check_triton(features.device)
        if torch.float64 in (dtype, features.dtype):
            raise ValueError("the triton kernels take float32, float16 and bfloat16, not float64: use 'torch'")
    implementation, _ = _implementations(kernels)
    dropout = GateDropout(p, seed, first_tile) if p else None
    with torch.cuda.device_of(features), torch.autocast(features.device.type, enabled=False):
        scores, partial = implementation.forward(features, weights, biases, w_weight, w_bias, mask, dropout, dtype)
    return scores, *partial


@_forward.register_fake
def _(
    features: Tensor,
    weights: Tensor,
    biases: Tensor,
    w_weight: Tensor,
    w_bias: Tensor,
    mask: Tensor | None,
    p: float,
    seed: int,
    first_tile: int,
    dtype: torch.dtype,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (k, dim), branches = features.shape, len(w_weight)
    shapes = ((k, branches), (branches,), (branches,), (branches, dim))
    accumulation = torch.promote_types(dtype, torch.float32)
    scores, m, l, acc = (features.new_empty(shape, dtype=accumulation) for shape in shapes)
    return scores, m, l, acc


@torch.library.custom_op("slidescale::gated_attention_backward", mutates_args=())
def _backward(
    grad_scores: Tensor,
    grad_l: Tensor,
    grad_acc: Tensor,
    features: Tensor,
    weights: Tensor,
    biases: Tensor,
    w_weight: Tensor,
    scores: Tensor,
    m: Tensor,
    p: float,
    seed: int,
    first_tile: int,
    dtype: torch.dtype,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, weights, biases, w_weight and w_bias, in their dtypes; of w_bias, in the scores'.

    ∂L/∂s_k = exp(s_k − m) (∂L/∂l + h_k · ∂L/∂acc) + what other uses of the scores give; m counts as a constant.
    ∂L/∂h_k = Σ_b exp(s_kb − m_b) ∂L/∂acc_b, and what flows back through the gate, which is computed again.
    """
    _, implementation = _implementations(kernels)
    dropout = GateDropout(p, seed, first_tile) if p else None
    with torch.cuda.device_of(features), torch.autocast(features.device.type, enabled=False):
        d_features, d_weights, d_biases, d_w, d_c = implementation.backward(
            grad_scores, grad_l, grad_acc, features, weights, biases, w_weight, scores, m, dropout, dtype
        )
    return (
        d_features,
        d_weights.to(weights.dtype),
        d_biases.to(biases.dtype),
        d_w.to(w_weight.dtype),
        d_c,
    )


@_backward.register_fake
def _(
    grad_scores: Tensor,
    grad_l: Tensor,
    grad_acc: Tensor,
    features: Tensor,
    weights: Tensor,
    biases: Tensor,
    w_weight: Tensor,
    scores: Tensor,
    m: Tensor,
    p: float,
    seed: int,
    first_tile: int,
    dtype: torch.dtype,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(features), like(weights), like(biases), like(w_weight), scores.new_empty(len(w_weight))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    features, weights, biases, w_weight, _, _, *ctx.settings = inputs
    scores, m, _, _ = output
    # Features, scores and m, because each tile's share and gate are computed from them again; a shared copy of the
    # weights, which are small.
    ctx.save_for_backward(features, weights, biases, w_weight, scores, m)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_scores, _, grad_l, grad_acc = grads
    gradients = torch.ops.slidescale.gated_attention_backward(
        grad_scores.contiguous(), grad_l.contiguous(), grad_acc.contiguous(), *ctx.saved_tensors, *ctx.settings
    )
    return *gradients, None, *[None] * len(ctx.settings)


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.slidescale.gated_attention)
def _count_flops(features: Any, weights: Any, biases: Any, w_weight: Any, *_: Any, **__: Any) -> int:
    (k, dim), width, branches = features, weights[0] // 2, w_weight[0]
    return 2 * k * (2 * width * dim + branches * (width + dim))


@register_flop_formula(torch.ops.slidescale.gated_attention_backward)
def _count_backward_flops(
    grad_scores: Any,
    grad_l: Any,
    grad_acc: Any,
    features: Any,
    weights: Any,
    biases: Any,
    w_weight: Any,
    *_: Any,
    **__: Any,
) -> int:
    (k, dim), width, branches = features, weights[0] // 2, w_weight[0]
    return 2 * k * (3 * 2 * width * dim + branches * (2 * width + 2 * dim))
