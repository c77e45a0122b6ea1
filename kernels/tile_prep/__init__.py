"""uint8 tiles to normalised channels-last floats, turned and recoloured on the way if asked."""

from slidescale.kernels.tile_prep.operator import prepare_tiles

__all__ = ["prepare_tiles"]
