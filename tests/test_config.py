"""Settings refuse nonsense, and ds.json and the recipe cannot contradict each other unseen."""

import dataclasses
import json
import os
import subprocess
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
from slidescale.engine.errors import ConfigError
from slidescale.engine.strategies.ds_config import complete_ds_config, read_ds_config
from slidescale.engine.strategies.make import select_strategy
from slidescale.engine.strategies.schedule import Schedule
from slidescale.engine.units import parse_size

CONFIG = Config(run=RunConfig(name="test"), optim=OptimConfig(lr=3e-4, clip=0.5, weight_decay=0.04, min_lr_ratio=0.1))
SCHEDULE = Schedule(warmup_steps=10, total_steps=100)


def complete(content: dict[str, Any], config: Config = CONFIG, *, bf16: bool = False) -> dict[str, Any]:
    return complete_ds_config(content, config, SCHEDULE, bf16=bf16)


def test_the_projects_own_ds_json_takes_everything_from_the_recipe() -> None:
    ds = complete(read_ds_config(Path(__file__).parent.parent / "ds.json"), bf16=True)
    assert ds["optimizer"]["params"] == {"torch_adam": True, "lr": 3e-4, "weight_decay": 0.04}
    assert "scheduler" not in ds, "the recipe's own: DeepSpeed's begin with steps that change nothing"
    assert ds["gradient_clipping"] == 0.5
    assert ds["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "auto" not in json.dumps(ds).replace("torch_autocast", "")


def test_deepspeeds_schedulers_take_the_recipes_lengths() -> None:
    auto = {"warmup_type": "auto", "warmup_num_steps": "auto"}
    ds = complete({"scheduler": {"type": "WarmupCosineLR", "params": auto | {"warmup_min_ratio": 0.1}}})
    assert ds["scheduler"]["params"] == {
        "warmup_type": "linear",
        "warmup_num_steps": 10,
        "warmup_min_ratio": 0.1,
        "cos_min_ratio": 0.1,
        "total_num_steps": 100,
    }
    stated = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100, "warmup_num_steps": "auto"}}}
    assert complete(stated)["scheduler"]["params"]["warmup_max_lr"] == 3e-4
    first_look = complete_ds_config(stated, CONFIG, None, bf16=False)
    assert first_look["scheduler"]["params"]["total_num_steps"] == 100, "step counts are not known yet"
    with pytest.raises(ConfigError, match="scheduler.type is 'OneCycle'; use WarmupLR"):
        complete({"scheduler": {"type": "OneCycle"}})


@pytest.mark.parametrize("setting", [{"encoder_frozen_epochs": 0.5}, {"weight_decay_end": 0.0}])
def test_deepspeeds_schedulers_do_not_know_every_setting(setting: dict[str, float]) -> None:
    config = Config(run=RunConfig(name="test"), optim=OptimConfig(**setting))  # type: ignore[arg-type]
    name = next(iter(setting)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"scheduler.type WarmupCosineLR knows nothing of --optim.{name}: leave"):
        complete({"scheduler": {"type": "WarmupCosineLR"}}, config)
    assert complete({}, config), "the recipe's scheduler does"


def test_clipping_is_always_explicit() -> None:
    """DeepSpeed clips at 1.0 by default."""
    assert complete({})["gradient_clipping"] == 0.5


def test_every_contradiction_is_shown_with_both_values() -> None:
    content = {
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.04}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}},
        "gradient_accumulation_steps": 4,
        "train_batch_size": 8,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": -1},
    }
    with pytest.raises(ConfigError) as caught:
        complete(content)
    for expected in (
        "gradient_clipping is 1.0 and --optim.clip is 0.5",
        "optimizer.params.lr is 0.001 and --optim.lr is 0.0003",
        "scheduler.params.warmup_num_steps is 7 and",
        "gradient_accumulation_steps is 4 and",
        "train_batch_size",
        "fp16.enabled",
        "zero_optimization.reduce_bucket_size is -1",
    ):
        assert expected in str(caught.value)
    assert "weight_decay" not in str(caught.value)


def test_precision() -> None:
    assert complete({"torch_autocast": {"enabled": True}})["torch_autocast"]["enabled"], "ds.json decides"
    assert not complete({"torch_autocast": {"enabled": False}}, bf16=True)["torch_autocast"]["enabled"]
    fp32 = Config(run=RunConfig(name="test", precision="fp32"), optim=CONFIG.optim)
    with pytest.raises(ConfigError, match="torch_autocast.enabled is True and --run.precision"):
        complete({"torch_autocast": {"enabled": True}}, fp32)
    with pytest.raises(ConfigError, match="torch_autocast.dtype is 'float16'"):
        complete({"torch_autocast": {"enabled": True, "dtype": "float16"}})


def test_ds_json_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n  "a": 1,,\n}')
    with pytest.raises(ConfigError, match="line 2 column 10"):
        read_ds_config(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_ds_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (DataConfig, {"mpp_um": 0}),
        (DataConfig, {"epoch_share": 0.0}),
        (DataConfig, {"epoch_share": 1.1}),
        (OptimConfig, {"weight_decay_end": -0.1}),
        (OptimConfig, {"encoder_frozen_epochs": -1.0}),
        (DataConfig, {"k": 0}),
        (DataConfig, {"min_tissue": 1.5}),
        (DataConfig, {"min_tissue": 0.0}),
        (DataConfig, {"classes": ("one",)}),
        (ModelConfig, {"dropout": 1.0}),
        (MemoryConfig, {"chunk": 0}),
        (OptimConfig, {"lr": -1}),
        (OptimConfig, {"lr": float("inf")}),
        (RunConfig, {"name": "a/b"}),
        (RunConfig, {"name": "a", "epochs": 0}),
    ],
)
def test_nonsense_is_refused_by_name(section: Any, values: dict[str, Any]) -> None:
    name = next(key for key in values if key != "name" or len(values) == 1)
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        section(**values)


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        ({"pooling": "mean", "attention_dim": 64}, ["--model.attention-dim is 64: is for --model.pooling gated"]),
        (
            {"pooling": "max", "attention_dim": 64, "attention_branches": 2, "attention_dropout": 0.1},
            ["--model.attention-dim 384 --model.attention-branches 1 --model.attention-dropout 0.0"],
        ),
        (
            {"transformer_heads": 4},
            [
                "--model.transformer-heads is 4: is for transformer layers, of which there are none",
                "add: --model.transformer-heads 8",
            ],
        ),
    ],
)
def test_settings_that_nothing_reads_are_refused_together(model: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(run=RunConfig(name="t"), model=ModelConfig(**model))
    assert all(each in str(caught.value) for each in lines)
    read = {"pooling": "gated_attention", "transformer_layers": 1}
    Config(run=RunConfig(name="t"), model=ModelConfig(**model | read))


@pytest.mark.parametrize(
    ("parallel", "ds", "ranks", "name"),
    [
        ({}, False, 1, "single"),
        ({}, False, 2, "ddp"),
        ({}, True, 1, "zero"),
        ({"strategy": "fsdp", "fsdp_hold": True}, False, 1, "fsdp"),
        ({"strategy": "ddp"}, False, 1, "ddp"),
    ],
)
def test_strategies_are_selected(parallel: dict[str, Any], ds: bool, ranks: int, name: str) -> None:
    assert select_strategy(with_parallel(parallel, ds=ds), ranks=ranks) == name


@pytest.mark.parametrize(
    ("parallel", "ds", "ranks", "message"),
    [
        ({"strategy": "zero"}, False, 2, "zero takes --deepspeed_config ds.json"),
        ({"strategy": "fsdp"}, True, 2, "--deepspeed_config is for strategy zero, and --parallel.strategy is fsdp"),
        ({"strategy": "single"}, False, 2, "single is one process, and 2 were started"),
        ({"fsdp_hold": True, "fsdp_shard": "tiles"}, False, 2, "--parallel.fsdp-hold, --parallel.fsdp-shard needs"),
    ],
)
def test_strategies_that_cannot_be(parallel: dict[str, Any], ds: bool, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_strategy(with_parallel(parallel, ds=ds), ranks=ranks)


def with_parallel(parallel: dict[str, Any], *, ds: bool) -> Config:
    return dataclasses.replace(
        CONFIG, parallel=ParallelConfig(**parallel), deepspeed_config=Path("ds.json") if ds else None
    )


def test_slides_a_step_and_optimizers_agree_with_ds_json() -> None:
    two = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, accumulate=2))
    assert complete({}, two)["gradient_accumulation_steps"] == 2
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 4 and --optim.accumulate is 2"):
        complete({"gradient_accumulation_steps": 4}, two)
    sgd = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, optimizer="sgd"))
    with pytest.raises(ConfigError, match="optimizer.type is 'Lion' and --optim.optimizer is 'sgd'"):
        complete({"optimizer": {"type": "Lion"}}, sgd)
    assert complete({}, sgd)["zero_allow_untested_optimizer"]
    lamb = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, optimizer="apex_lamb"))
    with pytest.raises(ConfigError, match="apex_lamb needs whole parameters, which ZeRO splits"):
        complete({"zero_optimization": {"stage": 2}}, lamb)


@pytest.mark.parametrize("budget", ["8", "GiB", "0GiB", "-1GiB", "8 Gb/s", "8XB"])
def test_sizes_have_units(budget: str) -> None:
    with pytest.raises(ConfigError, match="--memory.budget is .*must be a size such as 8GiB"):
        MemoryConfig(budget=budget)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 1024**3),
        ("24GB", 24 * 10**9),
        ("24 GB", 24 * 10**9),
        ("512 mib", 512 * 1024**2),
        ("1.5tb", 15 * 10**11),
    ],
)
def test_sizes_are_binary_or_decimal(text: str, size: int) -> None:
    assert parse_size(text, "--memory.budget") == size
    MemoryConfig(budget=text)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ([], "python recipes/egfr.py --run.seed 1"),
        (["RANKS=2"], "deepspeed --quiet --num_accelerators 2 recipes/egfr.py --deepspeed_config ds.json --run.seed 1"),
    ],
)
def test_make_egfr_takes_deepspeed_for_several_ranks_only(words: list[str], command: str) -> None:
    """One process needs nothing that DeepSpeed would compile first."""
    root = Path(__file__).parent.parent
    asked = ["make", "--dry-run", "--no-print-directory", "egfr", "ARGS=--run.seed 1", *words]
    # Without what a make that runs the tests hands on.
    alone = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "RANKS", "ARGS"))
    }
    shown = subprocess.run(asked, cwd=root, env=alone, capture_output=True, text=True, check=True).stdout
    assert " ".join(shown.replace("\\\n", " ").split()).endswith(command)
