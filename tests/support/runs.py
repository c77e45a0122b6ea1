"""Folders of trained runs, made without training."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.models.make import make_model
from slidescale.engine.strategies.strategy import SingleStrategy
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.run_folder import record_run
from slidescale.engine.training.weights import WEIGHTS, write_weights

from test_training import make_config

CPU = torch.device("cpu")


def write_run(folder: Path, *, tile_px: int = 64, **model: Any) -> Path:
    """A run with random weights: adapters that do something, and statistics that are not 0 or 1."""
    config = make_config(Path("none.csv"), folder.parent, name=folder.name)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, tile_px=tile_px), model=dataclasses.replace(config.model, **model)
    )
    built = make_model(config, classes=2, bf16=False, kernels="torch")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in built.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(0.5 + noise if name.endswith("running_var") else value + 0.1 * (noise - 0.5))
    folder.mkdir()
    strategy = SingleStrategy(built, torch.optim.SGD(built.parameters(), lr=0.1), None, device=CPU, clip=0)
    write_weights(strategy, folder / WEIGHTS, {"epoch": "3", "step": "30"}, main=True)
    record_run(folder, config, None, ("wild_type", "mutant"), CrossEntropy((), 2))
    return folder
