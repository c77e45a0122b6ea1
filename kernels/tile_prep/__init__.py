"""uint8 tiles to normalised channels-last floats."""

from slidescale.kernels.tile_prep.reference import prepare_tiles

__all__ = ["prepare_tiles"]
