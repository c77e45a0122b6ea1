"""Errors of kernels against the definition in fp64."""

import torch

from slidescale.kernels.gated_attention import Gate
from slidescale.kernels.tile_prep.reference import prepare_tiles as define_tiles

from kernel_costs.work import ATTENTION, PYTORCH, TILES, Shape, attend, attention_inputs, prepare, tile_inputs

# Tiles of the comparison, at most: more would take time and show the same.
MOST_K = 2_001
MOST_TILES = 3


def errors_of(hows: list[str], shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, float]]:
    """Compare each implementation of each computation; return the worst relative error."""
    small = shape._replace(k=min(shape.k, MOST_K), tiles=min(shape.tiles, MOST_TILES))
    features, gate = attention_inputs(small, small.k, dtype, device)
    exact_gate = Gate(*(each.detach().double().requires_grad_() for each in gate))
    expected = attend(PYTORCH, features.detach().double().requires_grad_(), exact_gate, torch.float64)
    # The gradient of w's bias is a sum of shares that cancel: its error is measured by their size, 1.
    sizes = [*(float(each.norm()) for each in expected[:-1]), 1.0]
    tiles, mean, std = tile_inputs(small, device)
    exact = define_tiles(tiles, mean.double(), std.double(), torch.float64)
    errors: dict[str, dict[str, float]] = {ATTENTION: {}, TILES: {}}
    for how in hows:
        errors[ATTENTION][how] = max(
            float((each.double() - theirs).norm()) / size
            for each, theirs, size in zip(attend(how, features, gate, dtype), expected, sizes, strict=True)
        )
        prepared = prepare(how, tiles, mean, std, dtype)
        errors[TILES][how] = float((prepared.double() - exact).norm() / exact.norm())
    return errors


def is_wrong(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether an error is too large: more than 1e-5 in fp32, in 16 bits more than twice that of PyTorch."""
    most = 1e-5 if dtype == torch.float32 else 2 * errors[PYTORCH] + 1e-6
    return any(not error <= most for error in errors.values())  # NaN is too large
