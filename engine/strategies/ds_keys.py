"""Keys of ds.json: which DeepSpeed knows, and which have an effect on a run.

DeepSpeed ignores most keys that it does not know. Here each must be known, at every depth. The keys of a section are
taken from DeepSpeed's own definitions of it (see `strategies/ds_schema.py`); those at the top, which it has in no one
place, are listed here, and a test compares them with what DeepSpeed reads.
"""

import difflib
from collections.abc import Iterable
from typing import Any

# Handed to DeepSpeed, once completed.
USED = frozenset(
    {
        "aio",
        "bf16",
        "bfloat16",
        "disable_python_gc",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "log_level",
        "optimizer",
        "scheduler",
        "steps_per_print",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
SECTIONS = ("aio", "bf16", "bfloat16", "fp16", "optimizer", "scheduler", "torch_autocast", "zero_optimization")

_CURVES = "a run writes TensorBoard's curves and history.csv itself"
_RANKS = "ranks share the tiles of a slide, by --parallel.tile-ranks"
_TIMES = "TensorBoard has the seconds of a step by phase, and the line of each epoch has peak memory"
_CHECKPOINTS = "a run writes its checkpoints itself"
_FP32 = "weights, gradients and their sums over ranks are fp32"
_TILES = "--data.k and --data.epoch-share say which tiles and slides are drawn"
_REMOVED = "DeepSpeed no longer has it"
# Read by DeepSpeed, or once was, and without effect on a run, whose steps are not DeepSpeed's; and what has the effect.
NOT_HERE = {
    "activation_checkpointing": "--memory.policy and --memory.checkpoint-blocks compute activations again",
    "amp": "bf16 arithmetic is torch_autocast",
    "autotuning": "`slidescale plan` says what a step needs",
    "checkpoint": _CHECKPOINTS,
    "comet": _CURVES,
    "comms_logger": "benchmarks/strategies.py counts the bytes that ranks exchange",
    "communication_data_type": _FP32,
    "compile": "a step runs as it is",
    "compression_training": _REMOVED,
    "csv_monitor": _CURVES,
    "curriculum_learning": _TILES,
    "data_efficiency": _TILES,
    "data_types": _FP32,
    "dataloader_drop_last": "an epoch takes every slide, or --data.epoch-share of them",
    "datastates_ckpt": _CHECKPOINTS,
    "disable_allgather": "ZeRO needs it",
    "dump_state": "config.json in the run's folder has all settings",
    "eigenvalue": _REMOVED,
    "elasticity": "a run keeps its number of ranks",
    "expert_parallel": _RANKS,
    "flops_profiler": _TIMES,
    "gradient_allreduce_op": "the gradient is the mean over the slides of a step",
    "gradient_predivide_factor": _FP32,
    "graph_harvesting": _REMOVED,
    "hybrid_engine": "a run only trains",
    "managed_gradient_accumulation": "--optim.accumulate says how many slides a step takes one after another",
    "memory_breakdown": _TIMES,
    "nebula": _CHECKPOINTS,
    "pipeline": _RANKS,
    "prescale_gradients": _FP32,
    "progressive_layer_drop": "--model.drop-path leaves out blocks at random",
    "quantize_training": _REMOVED,
    "seq_parallel_communication_data_type": _FP32,
    "sequence_parallel_size": _RANKS,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "tensor_parallel": _RANKS,
    "tensorboard": _CURVES,
    "timers": _TIMES,
    "use_data_before_expert_parallelism": _RANKS,
    "vocabulary_size": "tiles have no vocabulary",
    "wall_clock_breakdown": _TIMES,
    "wandb": _CURVES,
    "weight_quantization": _FP32,
}
# What these say when they change nothing, beside false, null, 0 and "auto".
NEUTRAL = {
    "communication_data_type": "fp32",
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1,
    "managed_gradient_accumulation": True,
    "seq_parallel_communication_data_type": "fp32",
    "sequence_parallel_size": 1,
}


def check_keys(ds: dict[str, Any]) -> list[str]:
    """Every key that DeepSpeed does not know, or that has no effect here.

    Args:
        ds: ds.json as parsed; left without what is null, without the sections of `NOT_HERE`, and without what is no
            object and should be.

    Returns:
        One line per problem, with near matches or with the setting that has the effect.
    """
    problems = []
    for key, value in list(ds.items()):
        if value is None:
            del ds[key]
        if key in NOT_HERE:
            ds.pop(key, None)
            if not (_is_off(value) or value == NEUTRAL.get(key)):
                problems.append(f"{key} has no effect here, and must be left out: {NOT_HERE[key]}")
        elif key not in USED:
            problems.append(_unknown("", key, USED | NOT_HERE.keys()))
        elif key in SECTIONS and value is not None and not isinstance(value, dict):
            del ds[key]
            problems.append(f"{key} is {value!r}, and must be an object, {{…}}")
    from slidescale.engine.strategies.ds_schema import section_keys  # imports DeepSpeed, which takes seconds

    for name in SECTIONS:
        if name in ds:
            problems += _check_section(name, ds[name], section_keys(name, ds[name]))
    return problems


def _check_section(name: str, section: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Unknown keys of a section and of those in it.

    Args:
        known: the section's keys; each with its own keys, or with None where what it holds is not looked into.
    """
    problems = []
    for key, value in section.items():
        if key not in known:
            problems.append(_unknown(f"{name}.", key, known))
        elif known[key] is not None and value is not None and value != "auto":
            if isinstance(value, dict):
                problems += _check_section(f"{name}.{key}", value, known[key])
            else:
                section[key] = {}
                problems.append(f"{name}.{key} is {value!r}, and must be an object, {{…}}")
    return problems


def _unknown(prefix: str, key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.6)
    return f"DeepSpeed knows no {prefix}{key}" + (f"; near: {', '.join(near)}" if near else "")


def _is_off(value: Any) -> bool:
    """Whether a section is switched off, or a value is as good as none."""
    if isinstance(value, dict):
        return _is_off(value["enabled"]) if "enabled" in value else all(map(_is_off, value.values()))
    return value is None or value in (False, 0, "", "auto") or value == []
