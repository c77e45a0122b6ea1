"""All forms in which the Triton kernels of gated attention are launched."""

from collections.abc import Iterator
from typing import Any

import torch

from slidescale.kernels.gated_attention.backward import (
    features_gradient,
    gate_gradient,
    score_gradient,
    weights_gradient,
)
from slidescale.kernels.gated_attention.block_sizes import (
    MANY_BRANCHES,
    UNALIGNED,
    BlockSizes,
    gate_blocks,
    pool_blocks,
    product_blocks,
    score_blocks,
)
from slidescale.kernels.gated_attention.forward import pool_block
from slidescale.kernels.variant import POINTERS, Variant

# Dtypes of the features and of the gate's matrix products; they differ under autocast.
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
SCALARS = {
    "k": "i64",
    "first": "i64",
    "end": "i64",
    "dim": "i32",
    "gate_dim": "i32",
    "branches": "i32",
    "stride": "i32",
    "seed": "i64",
    "first_tile": "i64",
    "drop": "fp32",
    "split_tiles": "i32",
}


def variants() -> Iterator[Variant]:
    """One for each kernel, pair of dtypes, and constant that changes the code."""
    for features, dtype in DTYPES:
        for dropout in (False, True):
            pools, gates = pool_blocks(dtype, dropout=dropout), gate_blocks(features, dtype, dropout=dropout)
            for branches in (1, MANY_BRANCHES):
                yield _variant(pool_block, features, dtype, pools, DROPOUT=dropout, BRANCHES=branches)
            yield _variant(gate_gradient, features, dtype, gates, DROPOUT=dropout)
        products = product_blocks(dtype)
        yield _variant(features_gradient, features, dtype, products)
        yield _variant(weights_gradient, features, dtype, products)
    for features in POINTERS:
        for branches in (1, MANY_BRANCHES):
            yield _variant(score_gradient, features, features, score_blocks(), BRANCHES=branches)


def _variant(kernel: Any, features: torch.dtype, dtype: torch.dtype, blocks: BlockSizes, **constants: Any) -> Variant:
    pointers = {"features": features, "d_features": features, "weights": dtype, "d_gate": dtype}
    constants |= {"BLOCK_K": blocks.tiles, "BLOCK_L": blocks.gate, "BLOCK_D": blocks.dim}
    signature, constexprs = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        else:
            is_scalar = name in SCALARS
            signature[name] = SCALARS[name] if is_scalar else POINTERS[pointers.get(name, torch.float32)]
    if "mask" in signature:
        signature["mask"] = "*u1"
    aligned = {name for name, word in signature.items() if word.startswith("*") and name not in UNALIGNED} | {
        "dim",
        "gate_dim",
    }
    words = [kernel.__name__, str(features).removeprefix("torch.")]
    words += [f"in {dtype}".replace("torch.", "")] if dtype != features else []
    words += ["dropout"] if constants.get("DROPOUT") else []
    words += [f"up to {constants['BRANCHES']} branches"] if constants.get("BRANCHES", 1) > 1 else []
    return Variant(
        kernel, signature, constexprs, frozenset(aligned & set(signature)), blocks.warps, blocks.stages, " ".join(words)
    )
