"""Runs with a frozen encoder, and its weights."""

from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slidescale.engine.config import Config, DataConfig, MemoryConfig, ModelConfig, OptimConfig, RunConfig
from slidescale.engine.models.encoder import Encoder


def write_weights(path: Path, seed: int = 1) -> Path:
    """Of a network with BatchNorm layers whose statistics are not those it starts with."""
    torch.manual_seed(seed)
    encoder = Encoder("test_resnet", tile_px=64)
    state = {
        name: torch.rand_like(value) + 0.5 if "running_var" in name else value
        for name, value in encoder.backbone.state_dict().items()
    }
    torch.save(state, path)
    return path


def make_frozen_config(manifest: Path, out: Path, weights: Path, *, frozen: bool = True, **changes: Any) -> Config:
    return Config(
        run=RunConfig(**({"name": "t", "out": out, "epochs": 1, "precision": "fp32", "heatmaps": 0} | changes)),
        data=DataConfig(manifest=manifest, tile_px=64, k=12, classes=("wild_type", "mutant"), max_excluded=0.25),
        model=ModelConfig(
            encoder="test_resnet", weights=weights, frozen=frozen, hidden_dim=16, attention_dim=8, dropout=0.0
        ),
        memory=MemoryConfig(chunk=64),
        optim=OptimConfig(optimizer="sgd", lr=0.02, clip=0.5),
    )


def losses(folder: Path) -> list[float]:
    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


def kept(out: Path) -> dict[str, Path]:
    """Features' files by slide."""
    return {file.name.rsplit("-", 1)[0]: file for file in sorted((out / "features").glob("*/*"))}
