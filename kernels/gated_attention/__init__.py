"""Gated attention pooling over the tiles of a slide (Ilse et al. 2018, "Attention-based Deep MIL", eq. 8 and 9)."""

from slidescale.kernels.gated_attention.operator import gated_attention
from slidescale.kernels.gated_attention.reference import (
    Attended,
    Gate,
    GateDropout,
    Partial,
    gated_scores,
    merge_partials,
    pool_partial,
)

__all__ = [
    "Attended",
    "Gate",
    "GateDropout",
    "Partial",
    "gated_attention",
    "gated_scores",
    "merge_partials",
    "pool_partial",
]
