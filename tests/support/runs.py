"""Settings of small runs, what a run left, and folders of trained runs, made without training."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from slidescale.engine.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
)
from slidescale.engine.models.make import make_model
from slidescale.engine.strategies.strategy import SingleStrategy
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.run_folder import record_run
from slidescale.engine.training.weights import WEIGHTS, write_weights

from support.tables import read_csv

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


def make_config(manifest: Path, out: Path, **changes: Any) -> Config:
    """A run of a few seconds; `changes` are of the run's section, or whole sections."""
    sections = {key: changes.pop(key) for key in ("resume", "deepspeed_config", "optim") if key in changes}
    classes = changes.pop("classes", ("wild_type", "mutant"))
    data = {"tile_px": 64, "k": 12, "classes": classes, "max_excluded": 0.25}
    return Config(
        run=RunConfig(**({"name": "t", "out": out, "epochs": 2, "precision": "fp32", "heatmaps": 2} | changes)),
        data=DataConfig(manifest=manifest, **data),
        model=ModelConfig(encoder="test_vit", hidden_dim=16, attention_dim=8, dropout=0.1),
        memory=MemoryConfig(chunk=64),
        **sections,
    )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last" / "state.pt", weights_only=True)["model"]


def rows_of(folder: Path) -> list[dict[str, str]]:
    """history.csv without what a clock or the process's size says."""
    rows = read_csv(folder / "history.csv")
    assert all(float(row["seconds"]) > 0 and float(row["tiles_per_s"]) > 0 for row in rows)
    return [
        {name: cell for name, cell in row.items() if name not in ("seconds", "tiles_per_s", "peak_gib")} for row in rows
    ]


def differing(path: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    found = load_file(path)
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value.cpu())]


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
