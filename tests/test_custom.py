"""An encoder and an aggregator of one's own in a recipe, named by package.module:Class."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slidescale.engine.commands import recipe
from slidescale.engine.commands.export import ExportRequest, export_encoder
from slidescale.engine.commands.heatmap import HeatmapRequest, draw_heatmap
from slidescale.engine.commands.predict import PredictRequest, predict_slides
from slidescale.engine.config import Config, ModelConfig, RunConfig
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.models.dropout import KeyedDropout
from slidescale.engine.models.gathered import Gathered
from slidescale.engine.models.make import make_model

from support.runs import make_config
from support.tables import read_csv

MODULE = """
import torch
from torch import nn


class TwoConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 8, stride=8), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(8, 12, 1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, x):
        return self.layers(x)


class MeanOfTiles(nn.Module):
    def __init__(self, dim, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes))

    def forward(self, features):
        return self.layers(features).mean(dim=0)


class KnowsRanks(nn.Module):
    def __init__(self, dim, classes):
        super().__init__()
        self.layer = nn.Linear(dim, classes)

    def forward(self, features, places, group):
        return group.sum(self.layer(features).sum(dim=0)) / len(places), None


def nothing(*args):
    return None
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_slide_models.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_slide_models"
    sys.modules.pop("my_slide_models", None)


def build(**model: Any) -> Any:
    config = Config(run=RunConfig(name="own"), model=ModelConfig(**model))
    return make_model(replace(config, data=replace(config.data, tile_px=32)), classes=3, bf16=False, kernels="torch")


def test_own_modules_become_a_slide_model(own_module: str) -> None:
    model = build(encoder=f"{own_module}:TwoConvolutions", aggregator=f"{own_module}:MeanOfTiles")
    assert model.encoder.dim == 12
    assert isinstance(model.aggregator, Gathered)
    assert sum(isinstance(module, KeyedDropout) for module in model.modules()) == 2, "masks are the tiles' own"
    features = model.eval().encode(torch.zeros(4, 32, 32, 3, dtype=torch.uint8))
    assert features.shape == (4, 12)
    native = build(encoder="test_resnet", aggregator=f"{own_module}:KnowsRanks")
    assert type(native.aggregator).__name__ == "KnowsRanks", "it takes (features, places, group) as it is"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregator": "no_such_package.models:A"}, "no_such_package.models:A: cannot import.*PYTHONPATH"),
        ({"aggregator": "my_slide_models:MeanOfTile"}, "my_slide_models has no MeanOfTile, did you mean 'MeanOfTiles'"),
        ({"aggregator": "my_slide_models:TwoConvolutions"}, r"cannot be called as TwoConvolutions\(96, 3\)"),
        ({"aggregator": "my_slide_models:nothing"}, "makes a NoneType, and must make a torch.nn.Module"),
        (
            {"encoder": "my_slide_models:TwoConvolutions", "pretrained": True},
            "nothing is published for my_slide_models",
        ),
        ({"encoder": "my_slide_models:TwoConvolutions", "drop_path": 0.1}, "set stochastic depth in"),
        ({"encoder": "my_slide_models:TwoConvolutions", "weights": Path("none.pth")}, "no file none.pth"),
    ],
)
def test_what_does_not_fit_is_explained(own_module: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**({"encoder": "test_resnet"} | settings))


def test_settings_of_the_built_in_aggregator_are_refused() -> None:
    model = ModelConfig(aggregator="my_slide_models:MeanOfTiles", pooling="mean")
    with pytest.raises(ConfigError, match="--model.pooling is 'mean': is for the built-in aggregator"):
        Config(run=RunConfig(name="own"), model=model)


def test_a_run_with_own_modules(own_module: str, demo_manifest: Path, tmp_path: Path) -> None:
    """It trains, validates and predicts; what its aggregator or encoder cannot give is refused."""
    config = make_config(demo_manifest, tmp_path, epochs=1)
    model = ModelConfig(encoder=f"{own_module}:TwoConvolutions", aggregator=f"{own_module}:MeanOfTiles")
    folder = recipe.run(replace(config, model=model))
    assert not list((folder / "heatmaps").glob("*")), "there are no weights to draw"
    assert all(int(row["k"]) > 100 for row in read_csv(folder / "predictions.csv"))
    slide = next(demo_manifest.parent.glob("slides/*"))
    out = tmp_path / "predictions.csv"
    predict_slides(PredictRequest(run=folder, slides=(slide,), out=out))
    assert 0 < float(read_csv(out)[0]["probability_mutant"]) < 1
    with pytest.raises(UserError, match="my_slide_models:MeanOfTiles, gives tiles no weights to draw"):
        draw_heatmap(HeatmapRequest(run=folder, slide=slide, out=tmp_path / "heatmaps"))
    with pytest.raises(ConfigError, match="my_slide_models:TwoConvolutions, is not one that timm can build"):
        export_encoder(ExportRequest(run=folder, out=tmp_path / "encoder.safetensors"))
