"""ds.json: DeepSpeed's settings, completed and checked against the recipe's.

ds.json is the truth for optimizer, schedule, ZeRO and precision. Where it says "auto", or leaves out a value that the
recipe has, the recipe's is filled in; where both name a value, they must agree.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError

# Of DeepSpeed's schedulers, what the recipe has a value for.
SCHEDULER_KEYS = {
    "WarmupLR": ("warmup_max_lr", "warmup_num_steps"),
    "WarmupDecayLR": ("warmup_max_lr", "warmup_num_steps", "total_num_steps"),
    "WarmupCosineLR": ("cos_min_ratio", "warmup_num_steps", "total_num_steps"),
}


@dataclass(frozen=True)
class Schedule:
    """Lengths that schedules are made of, in optimizer steps.

    Attributes:
        warmup_steps: of the aggregator, and of the encoder once it trains.
        total_steps: of the run.
        frozen_steps: at the start, in which the encoder does not train.
    """

    warmup_steps: int
    total_steps: int
    frozen_steps: int = 0


def read_ds_config(path: Path) -> dict[str, Any]:
    """Parse ds.json.

    Raises:
        ConfigError: no such file, or not a JSON object (with line and column).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--deepspeed_config: cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return content


def complete_ds_config(
    content: dict[str, Any], config: Config, schedule: Schedule | None, *, bf16: bool
) -> dict[str, Any]:
    """Fill in what ds.json leaves to the recipe, and refuse what the two say differently.

    Args:
        content: ds.json as parsed.
        schedule: None for a first look, before the slides are known to be usable; it leaves step counts open.
        bf16: the precision that the recipe wants where ds.json does not say.

    Returns:
        A configuration without "auto", as DeepSpeed takes it.

    Raises:
        ConfigError: lists every contradiction, with both values.
    """
    ds = copy.deepcopy(content)
    problems: list[str] = []

    def settle(section: dict[str, Any], key: str, value: Any, where: str, ours: str) -> None:
        """Give `section[key]` the recipe's value, or note that it has another."""
        if section.get(key, "auto") == "auto":
            section[key] = value
        elif section[key] != value:
            problems.append(f"{where}{key} is {section[key]!r} and {ours} is {value!r}")

    settle(ds, "train_micro_batch_size_per_gpu", 1, "", "the number of slides of a tile group at a time")
    settle(ds, "gradient_accumulation_steps", config.optim.accumulate, "", "--optim.accumulate")
    if ds.pop("train_batch_size", "auto") != "auto":
        problems.append('train_batch_size follows from the number of ranks: leave it out, or set it to "auto"')
    settle(ds, "gradient_clipping", config.optim.clip, "", "--optim.clip")
    if optimizer := ds.get("optimizer"):
        ours, theirs = config.optim.optimizer, optimizer.get("type")
        if ours not in ("adamw", str(theirs).lower()):
            problems.append(f"optimizer.type is {theirs!r} and --optim.optimizer is {ours!r}")
        params = optimizer.setdefault("params", {})
        settle(params, "lr", config.optim.lr, "optimizer.params.", "--optim.lr")
        settle(params, "weight_decay", config.optim.weight_decay, "optimizer.params.", "--optim.weight-decay")
        for key in [key for key in ("betas", "eps") if params.get(key) == "auto"]:
            del params[key]  # the optimizer's own
    elif config.optim.optimizer == "sgd":
        ds.setdefault("zero_allow_untested_optimizer", True)  # it is elementwise, so its state can be split
    elif config.optim.optimizer == "apex_lamb" and ds.get("zero_optimization", {}).get("stage", 0) > 0:
        problems.append(
            "--optim.optimizer apex_lamb needs whole parameters, which ZeRO splits: use stage 0, or another optimizer"
        )
    if scheduler := ds.get("scheduler"):
        _settle_scheduler(scheduler, config, schedule, settle, problems)
    _settle_precision(ds, config, bf16, settle, problems)
    if ds.get("zero_optimization", {}).get("compute_grad_norm") is False:
        problems.append("zero_optimization.compute_grad_norm must stay on: a step whose norm is not finite is refused")
    problems += [f'{key} is "auto", and the recipe has no value for it' for key in _autos(ds)]
    if problems:
        raise ConfigError('ds.json and the recipe disagree; change one, or write "auto":\n  ' + "\n  ".join(problems))
    return ds


def uses_bf16(ds: dict[str, Any]) -> bool:
    """Whether a completed configuration asks for bf16 autocast."""
    return bool(ds["torch_autocast"]["enabled"])


def _settle_scheduler(
    scheduler: dict[str, Any],
    config: Config,
    schedule: Schedule | None,
    settle: Callable[..., None],
    problems: list[str],
) -> None:
    """Give one of DeepSpeed's schedulers the recipe's rates and lengths; its shape is its own."""
    name = scheduler.get("type")
    if name not in SCHEDULER_KEYS:
        problems.append(f"scheduler.type is {name!r}; use {', '.join(SCHEDULER_KEYS)}, or leave the scheduler out")
        return
    for setting, is_set in (
        ("--optim.encoder-frozen-epochs", config.optim.encoder_frozen_epochs > 0),
        ("--optim.weight-decay-end", config.optim.weight_decay_end is not None),
    ):
        if is_set:
            problems.append(
                f"scheduler.type {name} knows nothing of {setting}: leave the scheduler out for the recipe's, or "
                "leave that setting out"
            )
    rates = [config.optim.lr, config.optim.lr * config.optim.encoder_lr_scale]
    if "warmup_max_lr" in SCHEDULER_KEYS[name] and (rates[0] != rates[1] or config.optim.layer_decay != 1):
        problems.append(
            f"scheduler.type {name} has one rate for all, and --optim.encoder-lr-scale or --optim.layer-decay is not 1"
        )
    values = {
        "warmup_max_lr": (config.optim.lr, "--optim.lr"),
        "cos_min_ratio": (config.optim.min_lr_ratio, "--optim.min-lr-ratio"),
        "warmup_num_steps": (max(1, schedule.warmup_steps) if schedule else None, "--optim.warmup-epochs, in steps,"),
        "total_num_steps": (schedule.total_steps if schedule else None, "--run.epochs, in steps,"),
    }
    params = scheduler.setdefault("params", {})
    for key in SCHEDULER_KEYS[name]:
        value, ours = values[key]
        if value is not None:
            settle(params, key, value, "scheduler.params.", ours)
        elif params.get(key) == "auto":
            del params[key]
    for key, start in (("warmup_type", "linear"), ("warmup_min_lr", 0.0), ("warmup_min_ratio", 0.0)):
        if params.get(key) == "auto":
            params[key] = start


def _settle_precision(
    ds: dict[str, Any], config: Config, bf16: bool, settle: Callable[..., None], problems: list[str]
) -> None:
    """Weights stay fp32; matrix products run in bf16 under torch_autocast, or in fp32."""
    for name in ("bf16", "fp16"):
        section = ds.pop(name, {})
        if section.get("enabled", False) not in (False, "auto"):
            problems.append(
                f"{name}.enabled: weights stay fp32 here, for exact sums of many chunks' gradients; "
                'use "torch_autocast": {"enabled": true, "dtype": "bfloat16"}'
            )
    autocast = ds.setdefault("torch_autocast", {})
    if config.run.precision == "auto":
        if autocast.get("enabled", "auto") == "auto":
            autocast["enabled"] = bf16
    else:
        settle(autocast, "enabled", config.run.precision == "bf16", "torch_autocast.", "--run.precision bf16")
    settle(autocast, "dtype", "bfloat16", "torch_autocast.", "the dtype supported here")


def _autos(section: Any, prefix: str = "") -> list[str]:
    """Dotted names of all values that are still "auto"."""
    if isinstance(section, dict):
        return [name for key, value in section.items() for name in _autos(value, f"{prefix}.{key}".lstrip("."))]
    return [prefix] if section == "auto" else []
