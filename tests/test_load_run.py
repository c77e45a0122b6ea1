"""A run is loaded as it was, or the reason is given why it cannot be."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slidescale.engine.commands import recipe as main
from slidescale.engine.commands.predict import (
    PredictRequest,
    predict_slides,
)
from slidescale.engine.commands.trained import load_run
from slidescale.engine.config import ModelConfig
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.training.weights import WEIGHTS

from support.frozen import make_frozen_config
from support.frozen import write_weights as write_encoder_weights
from support.runs import CPU, change_json, differing, make_config, write_run
from support.tables import read_csv


@pytest.mark.parametrize(
    "model",
    [
        {"encoder": "test_resnet", "drop_path": 0.2},
        {"encoder": "test_vit", "lora_rank": 2, "drop_path": 0.2, "dropout": 0.3},
        {"encoder": "test_vit", "transformer_layers": 1, "transformer_heads": 2, "attention_branches": 3},
        {"encoder": "test_convnext", "slide_norm": True, "pooling": "max", "attention_dim": 384},
    ],
)
def test_a_run_is_loaded_as_it_was(tmp_path: Path, model: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "r", **model)
    run = load_run(folder, CPU)
    assert (run.epoch, run.step, run.classes) == (3, 30, ("wild_type", "mutant"))
    assert run.config.model == dataclasses.replace(make_config(Path("x"), tmp_path).model, **model)
    assert differing(folder / WEIGHTS, run.model.state_dict()) == []
    assert not run.model.training


def test_settings_return_from_json(trained_run: Path, demo_manifest: Path) -> None:
    written = make_config(demo_manifest, trained_run.parent)
    assert load_run(trained_run, CPU).config == written


def test_a_setting_that_was_not_there_has_its_default(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    change_json(folder / "config.json", lambda content: content["config"]["model"].pop("drop_path"))
    assert load_run(folder, CPU).config.model.drop_path == ModelConfig().drop_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no run .*/run-b, did you mean 'run-a'"),
        (lambda folder: (folder / "config.json").unlink(), "is not the folder of a run: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), "is unfinished: it has no model.safetensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"12345678"), "model.safetensors is damaged"),
        (
            lambda folder: change_json(folder / "config.json", lambda c: c["config"]["model"].update(hiden_dim=3)),
            "by slidescale 0.1.0, with settings that this version does not have:\n  model.hiden_dim, did you mean "
            "'model.hidden_dim'",
        ),
        (
            lambda folder: change_json(folder / "config.json", lambda c: c["config"]["model"].update(dropout=3)),
            "this version refuses: --model.dropout is 3",
        ),
        (
            lambda folder: change_json(
                folder / "config.json", lambda c: c["config"]["model"].update(pooling="mean", attention_dim=384)
            ),
            "do not have the same parts: aggregator.pooling.u_bias",
        ),
        (
            lambda folder: change_json(folder / "config.json", lambda c: c["config"]["model"].update(hidden_dim=32)),
            "does not fit the model of",
        ),
        (
            lambda folder: (
                (folder / "checkpoints/epoch-0004").mkdir(parents=True),
                (folder / "checkpoints/best").symlink_to("epoch-0004"),
            ),
            "is of epoch 3, and .* is epoch-0004: the run was killed",
        ),
    ],
)
def test_what_is_no_finished_run(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    write_run(tmp_path / "run-a")
    folder = write_run(tmp_path / "run-b")
    change(folder)
    with pytest.raises(UserError, match=message):
        load_run(folder, CPU)


def test_a_frozen_encoder_whose_file_has_moved(demo_manifest: Path, tmp_path: Path) -> None:
    weights = write_encoder_weights(tmp_path / "weights.pth")
    folder = main.run(make_frozen_config(demo_manifest, tmp_path, weights))
    before = load_run(folder, CPU).model.state_dict()
    moved = weights.rename(tmp_path / "moved.pth")
    with pytest.raises(UserError, match="whose weights are not in .*weights.pth: name their file by --weights"):
        load_run(folder, CPU)
    slide = demo_manifest.parent / "slides" / "slide-000.svs"
    predict_slides(PredictRequest(run=folder, slides=(slide,), out=tmp_path / "p.csv", weights=moved))
    assert len(read_csv(tmp_path / "p.csv")) == 1
    found = load_run(folder, CPU, encoder_weights=moved).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.items())
    other = write_encoder_weights(tmp_path / "other.pth", seed=2)
    with pytest.raises(UserError, match="of other weights than .*other.pth has now"):
        load_run(folder, CPU, encoder_weights=other)


def test_weights_for_an_encoder_that_has_its_own(sharp_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--weights is .*: the encoder of .* is not frozen"):
        load_run(sharp_run, CPU, encoder_weights=tmp_path / "weights.pth")
