"""The settings of a run, from the JSON that it or an earlier version has written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from slidescale.engine.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from slidescale.engine.errors import UserError
from slidescale.engine.training.run_config import read_config
from slidescale.engine.training.run_folder import check_same_settings

SOURCE = Path("runs/t/config.json")
# Other than the defaults, and of each kind of value: paths, numbers or words, several words, several numbers, a table.
OTHER = Config(
    run=RunConfig(name="t", out=Path("elsewhere"), epochs=3),
    data=DataConfig(manifest=Path("m.csv"), classes=("b", "a"), label_map={"c": "b"}, k=12, default_mpp_um=0.25),
    model=ModelConfig(weights=Path("w.pth"), dropout=0, slide_norm=True),
    memory=MemoryConfig(policy="offload", offload_folder=Path("disk"), chunk=7),
    parallel=ParallelConfig(tile_ranks=2),
    optim=OptimConfig(class_weights=(1.0, 2.5), weight_decay_end=0.4, clip=0),
    deepspeed_config=Path("ds.json"),
)


def recorded(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(config.as_dict()))


def test_settings_return_from_json() -> None:
    assert read_config(recorded(OTHER), SOURCE, "0.1.0") == OTHER
    plain = Config(run=RunConfig(name="t"))
    assert read_config(recorded(plain), SOURCE, "0.1.0") == plain
    different = {name for name, value in OTHER.flat().items() if plain.flat()[name] != value}
    assert len(different) >= 16


def test_what_was_not_recorded_has_its_default() -> None:
    settings = recorded(OTHER)
    del settings["memory"], settings["model"]["slide_norm"], settings["resume"]
    found = read_config(settings, SOURCE, "0.1.0")
    assert found == dataclasses.replace(
        OTHER, memory=MemoryConfig(), model=dataclasses.replace(OTHER.model, slide_norm=False)
    )


@pytest.mark.parametrize("spread", ["split", "gathered"])
def test_a_setting_that_never_had_an_effect_is_read_over(tmp_path: Path, spread: str) -> None:
    """How a transformer's tiles spread over ranks: the results were equal."""
    config = Config(run=RunConfig(name="t"), model=ModelConfig(transformer_layers=2))
    settings = recorded(config)
    settings["model"]["transformer_spread"] = spread
    found = read_config(settings, SOURCE, "0.1.0")
    assert {**found.flat(), "model.transformer_spread": None} == {**config.flat(), "model.transformer_spread": None}
    (tmp_path / "config.json").write_text(json.dumps({"config": settings, "classes": ["a", "b"]}))
    check_same_settings(tmp_path, config)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"hiden_dim": 3}, "does not have:\n  model.hiden_dim, did you mean 'model.hidden_dim'\\?\nuse slide"),
        (
            "modle",
            {"dropout": 0.5},
            "does not have:\n  modle.dropout, did you mean 'model.dropout'",
        ),
        ("model", {"dropout": 3}, "this version refuses: --model.dropout is 3: must be a probability"),
        ("data", {"k": "many"}, "this version refuses: .*data.k"),
        ("model", {"hidden_dim": "wide"}, "this version refuses: .*model.hidden_dim.*wide"),
        ("model", {"pooling": "median"}, "this version refuses: .*model.pooling.*median"),
        ("data", {"manifest": 5}, "this version refuses: "),
    ],
)
def test_what_this_version_refuses_is_named(section: str, values: dict[str, Any], message: str) -> None:
    settings = recorded(OTHER)
    settings.setdefault(section, {}).update(values)
    with pytest.raises(UserError, match=f"^{SOURCE} was written by slidescale 0.1.0, .*{message}"):
        read_config(settings, SOURCE, "0.1.0")
