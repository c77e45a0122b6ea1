"""Gated attention pooling over the tiles of a slide (Ilse et al. 2018, "Attention-based Deep MIL", eq. 9)."""

from slidescale.kernels.gated_attention.reference import Partial, gated_scores, pool_partial

__all__ = ["Partial", "gated_scores", "pool_partial"]
