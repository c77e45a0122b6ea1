"""The model that a config asks for."""

import logging
from typing import Any

import torch
from torch import nn

from slidescale.engine.config import Config, ModelConfig
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.custom import make_custom
from slidescale.engine.models.encoder import Encoder, GivenFeatures
from slidescale.engine.models.foundation import find_foundation_model
from slidescale.engine.models.gathered import Gathered
from slidescale.engine.models.packaged import PACKAGE, PACKAGED_ENCODER
from slidescale.engine.models.slide_model import SlideModel, takes_places_and_group
from slidescale.engine.seeding import seeded
from slidescale.kernels.dispatch import KernelName

log = logging.getLogger(__name__)


def make_model(config: Config, *, classes: int, bf16: bool, kernels: KernelName) -> SlideModel:
    """Encoder and aggregator, initialised from the run's seed."""
    settings = config.model
    with seeded(torch.device("cpu"), config.run.seed, "model"):
        encoder = Encoder(
            settings.encoder,
            tile_px=config.data.tile_px,
            pretrained=settings.pretrained,
            weights=settings.weights,
            drop_path=settings.drop_path,
            lora_rank=settings.lora_rank,
            augment_symmetry=config.data.augment_symmetry,
            stain_jitter=config.data.stain_jitter,
            kernels=kernels,
        )
        encoder.set_checkpointing(config.memory.checkpoint_blocks)
        aggregator = _make_aggregator(settings, encoder.dim, classes, kernels)
    return SlideModel(encoder, aggregator, autocast=torch.bfloat16 if bf16 else None)


def _make_aggregator(settings: ModelConfig, dim: int, classes: int, kernels: KernelName) -> nn.Module:
    if settings.aggregator is not None:
        module = make_custom("--model.aggregator", settings.aggregator, dim, classes)
        return module if takes_places_and_group(module) else Gathered(module)
    return Aggregator(
        dim,
        classes,
        pooling=settings.pooling,
        hidden_dim=settings.hidden_dim,
        attention_dim=settings.attention_dim,
        attention_branches=settings.attention_branches,
        attention_dropout=settings.attention_dropout,
        dropout=settings.dropout,
        slide_norm=settings.slide_norm,
        transformer_layers=settings.transformer_layers,
        transformer_heads=settings.transformer_heads,
        kernels=kernels,
    )


def describe_encoder(config: Config, encoder: Encoder | GivenFeatures) -> None:
    """Log where an encoder's weights come from, for a foundation model also its source and licence, and warn of one
    that can hardly learn as it is set up.
    """
    settings = config.model
    known = find_foundation_model(settings.encoder)
    level = logging.INFO
    if settings.weights:
        weights = f"those in {settings.weights}"
    elif not settings.pretrained:
        weights = "RANDOM"
        if config.data.manifest is not None:
            weights += "; use --model.pretrained or --model.weights FILE, unless that is meant"
            level = logging.WARNING
    elif settings.encoder == PACKAGED_ENCODER:
        weights = f"ImageNet's, of the package {PACKAGE}"
    elif known:
        weights = f"those of https://huggingface.co/{known[1].hub}"
    else:
        published: Any = getattr(encoder.backbone, "pretrained_cfg", {})
        tag = published.get("tag")
        weights = f"those that timm has for {settings.encoder.split('.')[0]}" + (f" under the tag {tag}" if tag else "")
    log.log(level, "weights: %s", weights)
    if known:
        log.info("encoder %s: %s; licence: %s", known[0], known[1].source, known[1].licence)
    if settings.pretrained or settings.weights:
        return
    if settings.lora_rank:
        log.warning(
            "--model.lora-rank trains adapters of %s, whose own weights stay as they are, and these are random: "
            "use --model.pretrained or --model.weights",
            settings.encoder,
        )
    if known:
        log.warning("%s has random weights: use --model.pretrained or --model.weights", settings.encoder)
    elif settings.frozen:
        log.warning(
            "--model.frozen keeps %s as it is, and its weights are random: use --model.pretrained or --model.weights",
            settings.encoder,
        )
    elif encoder.has_batch_norm() and not settings.slide_norm:
        log.warning(
            "%s has BatchNorm layers, whose statistics never train here, and random weights: it will hardly learn. "
            "Use pretrained weights, an encoder with other normalisation (resnet50_gn), or --model.slide-norm",
            settings.encoder,
        )
