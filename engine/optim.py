"""Parameter groups, optimizer and schedule of the recipe, for where ds.json names none."""

import math
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from slidescale.engine.config import OptimConfig
from slidescale.engine.ds_config import Schedule
from slidescale.engine.models.slide_model import SlideModel


def parameter_groups(model: SlideModel, config: OptimConfig) -> list[dict[str, Any]]:
    """Trained parameters in groups: aggregator and encoder at their own rates; matrices decay, vectors do not."""
    rates = ((model.aggregator, config.lr), (model.encoder, config.lr * config.encoder_lr_scale))
    groups = []
    for half, lr in rates:
        trained = [parameter for parameter in half.parameters() if parameter.requires_grad]
        for decay, members in (
            (config.weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),  # biases and normalisation layers
        ):
            if members:
                groups.append({"params": members, "lr": lr, "weight_decay": decay})
    return groups


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019)."""
    return torch.optim.AdamW(groups, lr=config.lr)


def make_scheduler(optimizer: Optimizer, config: OptimConfig, schedule: Schedule) -> LambdaLR:
    """Linear warm-up to the peak, then a half cosine down to `min_lr_ratio` of it."""

    def factor(step: int) -> float:
        if step < schedule.warmup_steps:
            return (step + 1) / schedule.warmup_steps
        progress = (step - schedule.warmup_steps) / max(1, schedule.total_steps - schedule.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine

    return LambdaLR(optimizer, factor)
