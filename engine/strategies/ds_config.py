"""ds.json: DeepSpeed's settings, completed and checked against the recipe's.

ds.json is the truth for optimizer, schedule, ZeRO and precision. Where it says "auto", or leaves out a value that the
recipe has, the recipe's is filled in; where both name a value, they must agree. Files that were written for Hugging
Face's trainer work as they are.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError
from slidescale.engine.strategies.ds_keys import check_keys
from slidescale.engine.strategies.schedule import Schedule

# Of DeepSpeed's schedulers, what the recipe has a value for.
SCHEDULER_KEYS = {
    "WarmupLR": ("warmup_max_lr", "warmup_num_steps"),
    "WarmupDecayLR": ("warmup_max_lr", "warmup_num_steps", "total_num_steps"),
    "WarmupCosineLR": ("cos_min_ratio", "warmup_num_steps", "total_num_steps"),
}


# The optimizers that ds.json may name: DeepSpeed's own, in any case of letters, and those of PyTorch's that update each
# element by itself, so that ZeRO may split their state, whatever DeepSpeed has tested.
DEEPSPEEDS = {"adam": "Adam", "adamw": "AdamW", "adagrad": "Adagrad", "lion": "Lion", "lamb": "Lamb"}
ELEMENTWISE = ("SGD", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop")


def read_ds_config(path: Path) -> dict[str, Any]:
    """Parse ds.json, in UTF-8, UTF-16 or UTF-32 (PowerShell's `>` writes UTF-16).

    Raises:
        ConfigError: no such file, or not a JSON object (with line and column), or a key that is there twice.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise ConfigError(f"--deepspeed_config: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text at byte {error.start}: save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except _RepeatedKeyError as error:
        raise ConfigError(f"{path}: the key {error} is there twice: leave one out") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return content


class _RepeatedKeyError(Exception):
    """Names the key."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


def complete_ds_config(
    content: dict[str, Any], config: Config, schedule: Schedule | None, *, bf16: bool, width: int | None = None
) -> dict[str, Any]:
    """Fill in what ds.json leaves to the recipe, and refuse what the two say differently or DeepSpeed does not take.

    Called twice: as a run starts, before anything costs time, and once slides and model are known. What is "auto" and
    has no value in the recipe becomes what Hugging Face's trainer takes (sizes by `width`) or DeepSpeed's default.

    Args:
        content: ds.json as parsed.
        schedule: None for a first look, before the slides are known to be usable; it leaves step counts open.
        bf16: the precision that the recipe wants where ds.json does not say.
        width: D of the encoder's features, which takes the place of a language model's hidden size; None, before there
            is a model, leaves the sizes to DeepSpeed.

    Returns:
        A configuration without "auto", as DeepSpeed takes it.

    Raises:
        ConfigError: lists every contradiction, with both values; every key that is not known or has no effect, and
            every value that DeepSpeed refuses, with what to change.
    """
    from slidescale.engine.strategies.ds_schema import refusal, wrong_values  # imports DeepSpeed, which takes seconds

    ds = copy.deepcopy(content)
    problems = check_keys(ds)

    def settle(section: dict[str, Any], key: str, value: Any, where: str, ours: str) -> None:
        """Give `section[key]` the recipe's value, or note that it has another."""
        if section.get(key, "auto") == "auto":
            section[key] = value
        elif section[key] != value:
            problems.append(
                f'{where}{key} is {section[key]!r} and {ours} is {value!r}: change one, or write "auto" for the latter'
            )

    settle(ds, "train_micro_batch_size_per_gpu", 1, "", "the number of slides that a tile group has at a time")
    settle(ds, "gradient_accumulation_steps", config.optim.accumulate, "", "--optim.accumulate")
    if ds.pop("train_batch_size", "auto") != "auto":
        problems.append('train_batch_size follows from the number of ranks: leave it out, or set it to "auto"')
    settle(ds, "gradient_clipping", config.optim.clip, "", "--optim.clip")
    _settle_zero(ds, width, problems)
    _settle_optimizer(ds, config, settle, problems)
    if scheduler := ds.get("scheduler"):
        _settle_scheduler(scheduler, config, schedule, settle, problems)
    _settle_precision(ds, config, bf16, settle, problems)
    ds = _without_autos(ds)
    problems += wrong_values(ds)
    if not problems and (refused := refusal(ds)):
        problems.append(f"DeepSpeed refuses it: {refused}")
    if problems:
        raise ConfigError(f"ds.json: {problems[0]}" if len(problems) == 1 else "\n  ".join(["ds.json:", *problems]))
    return ds


def uses_bf16(ds: dict[str, Any]) -> bool:
    """Whether a completed configuration asks for bf16 autocast."""
    return bool(ds["torch_autocast"]["enabled"])


def _settle_zero(ds: dict[str, Any], width: int | None, problems: list[str]) -> None:
    """Sizes that are "auto", and what ZeRO can do and exact gradients cannot have."""
    zero = ds.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage is {stage!r}: must be 0, 1, 2 or 3")
        del zero["stage"]  # which DeepSpeed need not say again
    # As transformers/integrations/deepspeed.py has them, for a hidden size.
    sizes = {} if width is None else {"reduce_bucket_size": width * width}
    if width is not None and stage == 3:
        sizes["stage3_prefetch_bucket_size"] = int(0.9 * width * width)
        sizes["stage3_param_persistence_threshold"] = 10 * width
    zero |= {key: value for key, value in sizes.items() if zero.get(key) == "auto"}
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, None) is True:
            problems.append(f'zero_optimization.{old} is no longer known: write "{new}": {{"device": "cpu"}}')
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name)
        if isinstance(section, dict) and section.get("device") == "nvme" and not section.get("nvme_path"):
            problems.append(f"zero_optimization.{name}.nvme_path is missing: the folder on the NVMe disk")
    if offload_device(zero, "offload_param") and stage != 3:
        problems.append(f"zero_optimization.offload_param is for stage 3, and stage is {stage}: leave one out")
    if offload_device(zero, "offload_optimizer") and stage == 0:
        problems.append("zero_optimization.offload_optimizer is for stages 1 to 3, and stage is 0: leave one out")
    if zero.get("compute_grad_norm") is False:
        problems.append("zero_optimization.compute_grad_norm must stay on: a step whose norm is not finite is refused")
    for key in (*(key for key in zero if key.startswith("zero_quantized_")), "zenflow"):
        if zero.get(key) not in (None, False, "auto"):
            problems.append(
                f"zero_optimization.{key} must be left out: gradients are exact here, and with it they are not"
            )
    if zero.get("zero_hpz_partition_size", 1) not in (1, "auto") and not torch.cuda.is_available():
        problems.append("zero_optimization.zero_hpz_partition_size needs GPUs: leave it out")


def _settle_optimizer(ds: dict[str, Any], config: Config, settle: Callable[..., None], problems: list[str]) -> None:
    """The optimizer that ds.json names, with the recipe's rates; or the recipe's own, as DeepSpeed takes it."""
    zero, ours = ds["zero_optimization"], config.optim.optimizer
    splits, offloads = zero.get("stage", 0) != 0, offload_device(zero, "offload_optimizer") is not None
    optimizer = ds.get("optimizer")
    if not optimizer:
        ds.pop("optimizer", None)
        if ours == "sgd":
            ds.setdefault("zero_allow_untested_optimizer", True)  # it is elementwise, so its state can be split
        elif ours == "apex_lamb" and splits:
            problems.append(
                "--optim.optimizer apex_lamb needs whole parameters, which ZeRO splits: use stage 0, or another "
                "optimizer"
            )
        if offloads and ds.setdefault("zero_force_ds_cpu_optimizer", False) is True:
            problems.append(
                "zero_force_ds_cpu_optimizer is true, and with offload_optimizer the recipe's optimizer is PyTorch's: "
                'leave it out, or add "optimizer": {"type": "AdamW"} for DeepSpeed\'s'
            )
        return
    kind = str(optimizer.get("type"))
    if ours not in ("adamw", kind.lower()):
        problems.append(f"optimizer.type is {kind!r} and --optim.optimizer is {ours!r}: change one")
    if kind.lower() == "lamb" and (splits or not torch.cuda.is_available()):
        problems.append("optimizer.type Lamb needs a GPU, and whole parameters, which ZeRO splits: use AdamW")
    elif kind.lower() == "lion" and not (offloads or torch.cuda.is_available()):
        problems.append(
            'optimizer.type Lion needs a GPU or, under "zero_optimization", "offload_optimizer": {"device": "cpu"}'
        )
    elif kind.lower() == "adagrad" and splits and not offloads:
        problems.append(
            "optimizer.type Adagrad: DeepSpeed splits it for one group of parameters only, and a run has several: use "
            "AdamW"
        )
    elif kind in ELEMENTWISE:
        ds.setdefault("zero_allow_untested_optimizer", True)
    elif kind.lower() not in DEEPSPEEDS:
        problems.append(
            f"optimizer.type {kind!r} does not run here; use {', '.join((*DEEPSPEEDS.values(), *ELEMENTWISE))}"
        )
    params = _params_of(optimizer)
    settle(params, "lr", config.optim.lr, "optimizer.params.", "--optim.lr")
    settle(params, "weight_decay", config.optim.weight_decay, "optimizer.params.", "--optim.weight-decay")


def _params_of(section: dict[str, Any]) -> dict[str, Any]:
    """The params of an optimizer or a scheduler; none are there where they are null or "auto"."""
    if not isinstance(section.get("params"), dict):
        section["params"] = {}
    return section["params"]


def offload_device(zero: dict[str, Any], name: str) -> str | None:
    """The device that ZeRO offloads to, "cpu" or "nvme"; None if it does not."""
    section = zero.get(name)
    device = section.get("device", "none") if isinstance(section, dict) else None
    return device if device in ("cpu", "nvme") else None


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
    params = _params_of(scheduler)
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
    for name in ("bf16", "bfloat16", "fp16"):
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


def _without_autos(section: dict[str, Any]) -> dict[str, Any]:
    """Leave to DeepSpeed's defaults what is still "auto"."""
    return {
        key: _without_autos(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }
