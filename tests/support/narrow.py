"""Networks that read parameters of modules which they do not call, made as narrow as they get."""

from collections.abc import Callable
from typing import Any

from torch import nn

from support.memory_slides import TILE_PX

_SMALL_VIT = {"img_size": TILE_PX, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
_SMALL_MAXXVIT = {"stem_width": 8, "embed_dim": (32, 32), "depths": (1, 1)}
READ_BUT_NOT_CALLED: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": _SMALL_VIT,
    "eva02_tiny_patch14_224": _SMALL_VIT,
    "swinv2_tiny_window8_256": {
        "img_size": TILE_PX,
        "embed_dim": 12,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "window_size": 4,
    },
    "test_maxvit": _SMALL_MAXXVIT | {"block_type": ("M", "M")},
    "test_coatnet": _SMALL_MAXXVIT | {"block_type": ("C", "T")},
}


def create_narrow(original: Callable, name: str, **options: Any) -> nn.Module:
    """`timm.create_model`, with the options of `READ_BUT_NOT_CALLED`."""
    return original(name, **options | READ_BUT_NOT_CALLED.get(name, {}))
