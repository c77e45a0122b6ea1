"""Foundation models of pathology by name: what their weights fit into, and how they are meant to be used.

Architectures, constructor options, normalisation and pooling are those of the models' cards and configuration files on
the Hugging Face hub, at their pretraining resolution of 224 px tiles. The weights are not part of this project, and
each model has a licence of its own.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from slidescale.engine.errors import ConfigError, first_line

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
# Gated feed-forward layers, which a configuration file cannot name.
SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
VIRCHOW = {"init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", **SWIGLU}

NON_COMMERCIAL = "CC-BY-NC-ND 4.0: not for commercial use, and weights derived from it may not be passed on"


@dataclass(frozen=True, kw_only=True)
class FoundationModel:
    """A published tile encoder.

    Attributes:
        hub: owner/name on the Hugging Face hub.
        architecture: timm's name of the network.
        options: arguments of timm's constructor.
        normalisation: mean and standard deviation of the channels scaled to 0..1.
        dim: D, the number of components of its features.
        patch_px: side of its patches in pixels; a tile's side is a multiple of it.
        concatenates: features are the class token beside the mean of the patch tokens, without registers; otherwise
            what timm's network returns, the class token.
        parameters: number of values in its weights.
        source: the publication.
        licence: in a few words.
    """

    hub: str
    architecture: str
    options: Mapping[str, Any] = field(default_factory=lambda: types.MappingProxyType({}))
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    dim: int
    patch_px: int
    concatenates: bool = False
    parameters: int
    source: str
    licence: str


FOUNDATION_MODELS = {
    "uni": FoundationModel(
        hub="MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        options={"init_values": 1e-5},
        dim=1024,
        patch_px=16,
        parameters=303_350_784,
        source="Chen et al. 2024, Nature Medicine 30:850",
        licence=NON_COMMERCIAL,
    ),
    "uni2": FoundationModel(
        hub="MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        options={
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "init_values": 1e-5,
            "no_embed_class": True,
            "reg_tokens": 8,
            **SWIGLU,
        },
        dim=1536,
        patch_px=14,
        parameters=681_394_176,
        source="Chen et al. 2024, Nature Medicine 30:850 (its successor UNI2-h)",
        licence=NON_COMMERCIAL,
    ),
    "virchow": FoundationModel(
        hub="paige-ai/Virchow",
        architecture="vit_huge_patch14_224",
        options=VIRCHOW,
        dim=2560,
        patch_px=14,
        concatenates=True,
        parameters=631_229_184,
        source="Vorontsov et al. 2024, Nature Medicine 30:2924",
        licence="Apache 2.0, access on request; not for diagnosis",
    ),
    "virchow2": FoundationModel(
        hub="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        options={**VIRCHOW, "reg_tokens": 4},
        dim=2560,
        patch_px=14,
        concatenates=True,
        parameters=631_239_424,
        source="Zimmermann et al. 2024, arXiv:2408.00738",
        licence=NON_COMMERCIAL,
    ),
    "h_optimus_0": FoundationModel(
        hub="bioptimus/H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        options={"init_values": 1e-5},
        normalisation=BIOPTIMUS,
        dim=1536,
        patch_px=14,
        parameters=1_134_774_272,
        source="Saillard et al. 2024, github.com/bioptimus/releases",
        licence="Apache 2.0",
    ),
    "h_optimus_1": FoundationModel(
        hub="bioptimus/H-optimus-1",
        architecture="vit_giant_patch14_reg4_dinov2",
        options={"init_values": 1e-5},
        normalisation=BIOPTIMUS,
        dim=1536,
        patch_px=14,
        parameters=1_134_774_272,
        source="Bioptimus 2025, huggingface.co/bioptimus/H-optimus-1",
        licence=NON_COMMERCIAL,
    ),
    "gigapath": FoundationModel(
        hub="prov-gigapath/prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        options={
            "patch_size": 16,
            "depth": 40,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
        },
        dim=1536,
        patch_px=16,
        parameters=1_134_953_984,
        source="Xu et al. 2024, Nature 630:181",
        licence="Apache 2.0 with conditions: for research, and not for diagnosis",
    ),
}


def find_foundation_model(name: str) -> tuple[str, FoundationModel] | None:
    """Find a model by its name here or on the hub, in any case: its name here and its entry; None if there is none.

    "UNI", "hf-hub:MahmoodLab/UNI", "MahmoodLab/uni" and "uni" are one.
    """
    wanted = name.lower().removeprefix("hf-hub:").removeprefix("hf_hub:")
    for key, model in FOUNDATION_MODELS.items():
        hub = model.hub.lower()
        if wanted in (hub, hub.split("/")[1]) or wanted.replace("-", "_") == key:
            return key, model
    return None


def create_foundation_model(
    name: str, model: FoundationModel, tile_px: int, *, pretrained: bool, weights: str | None, **options: Any
) -> Any:
    """Build the timm network, without weights, with those of the hub, or with those of a file; all must fit.

    Args:
        options: more arguments of timm's constructor.

    Raises:
        ConfigError: a tile is not made of whole patches, or the hub does not hand out the weights.
    """
    if tile_px % model.patch_px:
        raise ConfigError(
            f"--data.tile-px is {tile_px}, and {name} takes patches of {model.patch_px} px: it must be a multiple"
        )
    mean, std = model.normalisation
    # Without a classifier, timm loads strictly.
    published = {"mean": mean, "std": std, "num_classes": 0, "custom_load": False, "url": "", "file": weights}
    published |= {"hf_hub_id": model.hub, "hf_hub_filename": None, "input_size": (3, 224, 224)}
    try:
        return timm.create_model(
            model.architecture,
            pretrained=pretrained or weights is not None,
            pretrained_cfg_overlay=published,
            num_classes=0,
            img_size=tile_px,
            **model.options,
            **options,
        )
    except Exception as error:  # the hub's library has errors of its own, and passes on its HTTP library's
        if weights is not None or not pretrained:
            raise
        raise ConfigError(
            f"--model.pretrained: cannot get {name} from the Hugging Face hub ({first_line(error)}). Its weights are "
            f"gated: accept the licence at https://huggingface.co/{model.hub}, and log in with `hf auth login` or set "
            "HF_TOKEN; where there is no internet, bring the file and name it by --model.weights"
        ) from error


def class_and_patch_tokens(tokens: Tensor, prefix: int) -> Tensor:
    """Tokens `[n, T, D]`, the class token first, to `[n, 2 D]`: the class token, and the mean of the patch tokens.

    Args:
        prefix: number of tokens before the patch tokens: the class token and registers.
    """
    return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], dim=-1)
