"""Random numbers that are a function of what they are drawn for."""

from slidescale.kernels.keyed_random.reference import keyed_uniform

__all__ = ["keyed_uniform"]
