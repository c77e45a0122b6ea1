"""The content that ds.json may have, as DeepSpeed itself defines it."""

import inspect
from typing import Any, get_args

import torch
from pydantic import BaseModel, ValidationError

from slidescale.engine.strategies.zero import deepspeed

_config = deepspeed.runtime.config
_MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": deepspeed.runtime.zero.config.DeepSpeedZeroConfig,
    "bf16": deepspeed.runtime.precision_config.DeepSpeedBF16Config,
    "bfloat16": deepspeed.runtime.precision_config.DeepSpeedBF16Config,
    "fp16": deepspeed.runtime.precision_config.DeepSpeedFP16Config,
}
# Beside what the optimizer's class takes (DeepSpeed's `get_optimizer_configuration`).
_ADAM_KEYS = {_config.TORCH_ADAM_PARAM, _config.ADAM_W_MODE, "fp32_optimizer_states", "foreach"}


def section_keys(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section of ds.json, each with its own keys, or with None where there are none to know.

    Args:
        section: as given, whose `type` says which parameters an optimizer or a scheduler has.
    """
    if name in _MODELS:
        return _keys_of_model(_MODELS[name])
    if name == "aio":
        return dict.fromkeys(deepspeed.runtime.swap_tensor.aio_config.AIO_DEFAULT_DICT)
    if name == "torch_autocast":
        keys = ("ENABLED", "DTYPE", "LOWER_PRECISION_SAFE_MODULES")
        return {getattr(_config, f"TORCH_AUTOCAST_{key}"): None for key in keys}
    kind = str(section.get("type"))
    if name == "scheduler":
        made = getattr(deepspeed.runtime.lr_schedules, kind, None)
        return {"type": None, "params": made and _arguments(made)}
    optimizers = [made for made in _optimizers(kind) if made is not None]
    params = {key: None for made in optimizers for key in _arguments(made)}
    if kind.lower() in (_config.ADAM_OPTIMIZER, _config.ADAMW_OPTIMIZER):
        params |= dict.fromkeys(_ADAM_KEYS)
    return {"type": None, "params": params or None, _config.LEGACY_FUSION: None}


def wrong_values(ds: dict[str, Any]) -> list[str]:
    """Values that DeepSpeed's own definitions of the sections refuse; one line each."""
    problems = []
    for name, model in _MODELS.items():
        try:
            model(**ds.get(name, {}))
        except ValidationError as error:
            # Keys that are not known are `check_keys`'s to report.
            problems += [_line(name, each) for each in error.errors() if each["type"] != "extra_forbidden"]
        except AssertionError as error:  # an old name beside the new one
            problems.append(f"{name}: {error}")
    levels = list(deepspeed.utils.logging.log_levels)
    if str(ds.get("log_level", levels[0])).lower() not in levels:
        problems.append(f"log_level is {ds['log_level']!r}: must be one of {', '.join(levels)}")
    steps = ds.get("steps_per_print", 1)
    if not isinstance(steps, int) or steps < 1:
        problems.append(f"steps_per_print is {steps!r}: must be a whole number from 1 on")
    return problems


def refusal(ds: dict[str, Any]) -> str | None:
    """DeepSpeed's objection to a complete configuration, or None.

    It does so without knowing the number of ranks, so this can be called before they have met.
    """
    try:
        _config.DeepSpeedConfig(ds)
    except (ValueError, TypeError, AssertionError, _config.DeepSpeedConfigError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _line(section: str, error: Any) -> str:
    where = ".".join([section, *map(str, error["loc"])])
    return f"{where} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _keys_of_model(model: type[BaseModel]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = next(
            (
                each
                for each in (field.annotation, *get_args(field.annotation))
                if inspect.isclass(each) and issubclass(each, BaseModel)
            ),
            None,
        )
        keys |= dict.fromkeys([name, *([field.alias] if field.alias else [])], inner and _keys_of_model(inner))
    return keys


def _optimizers(kind: str) -> list[Any]:
    """The classes that DeepSpeed may take for a type of optimizer."""
    ops = deepspeed.ops
    by_name = {
        "adam": [torch.optim.Adam, ops.adam.FusedAdam, ops.adam.DeepSpeedCPUAdam],
        "adamw": [torch.optim.AdamW, ops.adam.FusedAdam, ops.adam.DeepSpeedCPUAdam],
        "adagrad": [torch.optim.Adagrad, deepspeed.ops.adagrad.DeepSpeedCPUAdagrad],
        "lion": [ops.lion.FusedLion, ops.lion.DeepSpeedCPULion],
    }
    return by_name.get(kind.lower(), [getattr(torch.optim, kind, None)])


def _arguments(made: Any) -> dict[str, Any]:
    names = list(inspect.signature(made).parameters)
    return dict.fromkeys(name for name in names if name not in ("params", "model_params", "optimizer"))
