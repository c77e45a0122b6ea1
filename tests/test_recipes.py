"""Each recipe as users start it, on its demo data, with two ranks; and its settings for a study."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from slidescale.engine.commands import recipe as main
from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError
from slidescale.engine.models.foundation import find_foundation_model

from support.grids import rest_in_full
from support.recipes import load, start
from support.tables import read_csv
from support.worlds import free_port

ROOT = Path(__file__).parent.parent
RECIPES = ("egfr", "breast", "finetune_vit", "frozen_baseline")
# Of a demo, as little as can be: its own network, rates and classes stay.
LITTLE = ["--data.demo-slides", "8", "--run.epochs", "1", "--run.heatmaps", "0", "--data.min-tissue", "0.98"]
PATIENCE_S = 1500


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs, so that the demo cohort is drawn once."""
    return tmp_path_factory.mktemp("runs")


def launched(name: str, launcher: str, out: Path, *words: str) -> str:
    """What a recipe prints when two ranks of it are started."""
    port = str(free_port())
    launch = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", port]
    if launcher == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [*launch, f"recipes/{name}.py", "--run.out", str(out), "--run.name", f"{name}-{launcher}", *LITTLE]
    command += [*words, *(["--deepspeed_config", "ds.json"] if launcher == "deepspeed" else [])]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


FEW = [("egfr", "deepspeed")]


@pytest.mark.parametrize(("name", "launcher"), rest_in_full(FEW, [*product(RECIPES, ("deepspeed", "torchrun"))]))
def test_a_recipe_trains_on_its_demo(name: str, launcher: str, out: Path) -> None:
    output = launched(name, launcher, out)
    assert "training on the DEMO COHORT" in output
    assert "epoch  1/1" in output
    assert ("zero2" if launcher == "deepspeed" else "ddp") in output
    demo = load(name).DEMO
    assert ("features are read" in output) == demo.model.frozen
    predictions = read_csv(out / f"{name}-{launcher}" / "predictions.csv")
    assert predictions and {row["label"] for row in predictions} <= set(demo.data.classes)


@pytest.mark.parametrize("name", ["breast", "finetune_vit", "frozen_baseline"])
def test_a_recipe_trains_in_one_process(name: str, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(name, "--run.out", str(out), "--run.name", name, *LITTLE)
    predictions = read_csv(out / name / "predictions.csv")
    assert predictions and {row["label"] for row in predictions} <= set(load(name).DEMO.data.classes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_page(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    module = load(name)
    assert "demo cohort" in str(module.__doc__)
    assert module.STUDY.run.name != module.DEMO.run.name


@pytest.mark.parametrize("name", RECIPES)
def test_a_study_begins_with_published_weights(name: str) -> None:
    module = load(name)
    assert module.STUDY.model.pretrained
    assert module.DEMO.model.pretrained == module.DEMO.model.frozen, "a demo's are random, unless they are all it has"


def test_the_eagle_preset_is_as_published() -> None:
    config = load("egfr").EAGLE
    assert find_foundation_model(config.model.encoder)
    flat = config.flat()
    published = {
        "model.encoder": "gigapath",
        "model.hidden_dim": 512,
        "model.attention_dim": 384,
        "model.dropout": 0.25,
        "model.pooling": "gated_attention",
        "optim.optimizer": "adamw",
        "optim.lr": 1e-6,
        "optim.warmup_epochs": 2,
        "optim.weight_decay": 0.04,
        "optim.weight_decay_end": 0.4,
        "run.epochs": 20,
        "data.epoch_share": 0.5,
        "optim.class_weights": [],
        "data.k": 23 * 96,
        "data.tile_px": 224,
        "data.augment_symmetry": True,
    }
    assert {name: flat[name] for name in published} == published
    assert config.optim.lr * config.optim.min_lr_ratio == pytest.approx(1e-8)
    # A value of the gate is left when it is left in both of its factors.
    assert 1 - config.model.attention_dropout == pytest.approx(0.75 * 0.75)
    # Why there are no class weights: the mean that is weighted is over one slide.
    logits, mutant = torch.tensor([[0.3, -1.2]]), torch.tensor([1])
    weighted = torch.nn.CrossEntropyLoss(torch.tensor([0.3, 0.7]))(logits, mutant)
    assert weighted == pytest.approx(torch.nn.CrossEntropyLoss()(logits, mutant).item())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What would have been run."""
    configs: list[Config] = []
    monkeypatch.setattr(main, "run", configs.append)
    monkeypatch.setattr(main, "configure_logging", lambda is_main: None)
    return configs


def test_presets_are_chosen_by_name(runs: list[Config]) -> None:
    start("egfr", "--data.manifest", "x.csv", "--preset", "eagle", "--run.epochs", "3")
    start("egfr", "--preset=eagle", "--data.manifest=x.csv")
    start("egfr", "--data.manifest", "x.csv")
    start("egfr")
    assert [config.run.name for config in runs] == ["egfr-eagle", "egfr-eagle", "egfr", "egfr-demo"]
    assert [config.run.epochs for config in runs[:2]] == [3, 20]
    assert runs[0].model == runs[1].model == load("egfr").EAGLE.model


@pytest.mark.parametrize(
    ("argv", "presets", "message"),
    [
        (["--data.manifest", "x.csv", "--preset", "eagel"], None, "--preset eagel: presets are: eagle"),
        (["--data.manifest", "x.csv", "--preset", "eagle"], {}, "--preset eagle: this recipe has no presets"),
        (["--preset", "eagle"], None, "--preset eagle is for your own slides: give --data.manifest"),
        (["--preset"], None, "--preset: name one of eagle"),
    ],
)
def test_presets_that_are_not_there(runs: list[Config], argv: list[str], presets: Any, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        start("egfr", *argv, presets=presets)
    assert not runs


def test_help_tells_of_presets(runs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        start("egfr", "--preset", "eagle", "--help")
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert "--preset NAME starts from other settings: eagle" in output
    assert "egfr-eagle" in output, "its values are shown"
    with pytest.raises(ConfigError):
        main._choose_settings(["--preset", "x"], *([load("egfr").DEMO] * 2), {})


def test_help_says_which_defaults_are_whose(runs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    """Those of your own slides are shown, and what the demo has otherwise is listed; a run without slides is a demo."""
    with pytest.raises(SystemExit):
        start("egfr", "--help")
    output = " ".join(capsys.readouterr().out.split())
    before, options = output.split("--data.tile-px INT")
    assert "The defaults below are those for your own slides" in before
    assert "Without a manifest, the demo cohort has these instead: --run.name egfr-demo" in before
    assert "--data.tile-px 64" in before and "--model.slide-norm," in before
    assert "(default: 224)" in options.split("--data.k")[0]
    start("egfr")
    assert runs[0].data.tile_px == 64


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_study_runs_arm_after_arm_over_ranks_and_goes_on(launcher: str, out: Path, tmp_path: Path) -> None:
    page = tmp_path / "k_study.md"
    words = ["--k", "4", "all", "--seeds", "0", "--page", str(page), "--data.min-tissue", "0.9"]
    output = launched("k_study", launcher, out, *words)
    rows = read_csv(out / f"k_study-{launcher}" / "study.csv")
    assert [row["arm"] for row in rows] == ["frozen", "k-4", "k-all"]
    assert float(rows[1]["tiles"]) == 4 < float(rows[2]["tiles"])
    assert all(0 <= float(row["metric"]) <= 1 and float(row["train_loss"]) > 0 for row in rows)
    assert output.count("study: k-4-seed-0") == 1, "the main rank speaks"
    assert "| end to end | 4" in output and "| end to end | 4" in page.read_text()
    assert page.with_name("k_study.png").stat().st_size > 10_000
    again = launched("k_study", launcher, out, *words)
    assert "epoch  1/1" not in again and read_csv(out / f"k_study-{launcher}" / "study.csv") == rows
