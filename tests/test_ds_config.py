"""ds.json: each key is known or refused, other tools' files work, and DeepSpeed's refusals are found at once."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from slidescale.engine.config import Config, OptimConfig, RunConfig
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.ds_config import complete_ds_config, read_ds_config
from slidescale.engine.strategies.ds_keys import NOT_HERE, USED
from slidescale.engine.strategies.schedule import Schedule

from support.worlds import World

CONFIG = Config(run=RunConfig(name="test"), optim=OptimConfig(lr=3e-4, clip=0.5))
SCHEDULE = Schedule(warmup_steps=10, total_steps=100)


def complete(content: dict[str, Any], width: int | None = None) -> dict[str, Any]:
    return complete_ds_config(content, CONFIG, SCHEDULE, bf16=False, width=width)


def zero(stage: int = 2, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


def hugging_face(stage: int) -> dict[str, Any]:
    """As the examples of its trainer have it."""
    sizes = dict.fromkeys(
        ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
    )
    offload = {"device": "cpu", "pin_memory": True}
    return {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
            },
        },
        "zero_optimization": {
            "stage": stage,
            "offload_optimizer": offload,
            "overlap_comm": True,
            "contiguous_gradients": True,
            **(
                {
                    "offload_param": offload,
                    "sub_group_size": 1e9,
                    "stage3_max_live_parameters": 1e9,
                    "stage3_max_reuse_distance": 1e9,
                    "stage3_gather_16bit_weights_on_model_save": True,
                }
                if stage == 3
                else {"allgather_partitions": True, "allgather_bucket_size": 2e8}
            ),
            **(sizes if stage == 3 else {"reduce_bucket_size": "auto"}),
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_files_for_hugging_faces_trainer_work_as_they_are(stage: int) -> None:
    """Sizes by the encoder's width, as there by the hidden size; DeepSpeed's defaults before there is an encoder."""
    ds = complete(hugging_face(stage), width=384)
    assert "auto" not in json.dumps(ds).replace("torch_autocast", "")
    found = ds["zero_optimization"]
    assert found["reduce_bucket_size"] == 384 * 384
    if stage == 3:
        assert found["stage3_prefetch_bucket_size"] == int(0.9 * 384 * 384)
        assert found["stage3_param_persistence_threshold"] == 3840
    assert not {"fp16", "bf16", "wall_clock_breakdown"} & ds.keys()
    first_look = complete(hugging_face(stage))["zero_optimization"]
    assert not [key for key in first_look if key.startswith("stage3_p") or key == "reduce_bucket_size"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, "DeepSpeed knows no zero_optimisation; near: zero_optimization"),
        ({"gradient_cliping": 1}, "DeepSpeed knows no gradient_cliping; near: gradient_clipping"),
        (zero(reduce_bucket=5), "DeepSpeed knows no zero_optimization.reduce_bucket; near: reduce_bucket_size"),
        (
            zero(offload_optimizer={"device": "cpu", "pinmemory": True}),
            "DeepSpeed knows no zero_optimization.offload_optimizer.pinmemory; near: pin_memory",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"weight_decy": 0}}},
            "DeepSpeed knows no optimizer.params.weight_decy; near: weight_decay",
        ),
        ({"optimizer": {"typ": "AdamW"}}, "DeepSpeed knows no optimizer.typ; near: type"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
            "DeepSpeed knows no scheduler.params.warmup_steps; near: warmup_num_steps",
        ),
        ({"torch_autocast": {"enable": True}}, "DeepSpeed knows no torch_autocast.enable; near: enabled"),
        ({"bf16": {"enable": True}}, "DeepSpeed knows no bf16.enable; near: enabled"),
        ({"aio": {"queue_dept": 8}}, "DeepSpeed knows no aio.queue_dept; near: queue_depth"),
        ({"zero_optimization": 3}, "zero_optimization is 3, and must be an object"),
        (zero(offload_param="cpu"), "zero_optimization.offload_param is 'cpu', and must be an object"),
    ],
)
def test_unknown_keys_are_refused_at_every_depth(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="^ds.json:") as caught:
        complete(content)
    assert message in str(caught.value)


def test_every_key_that_deepspeed_reads_is_known() -> None:
    """A newer DeepSpeed may read others."""
    from slidescale.engine.strategies.zero import deepspeed

    read: set[str] = set()

    class Noting(dict):
        """Notes what is asked for."""

        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            read.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return self

    deepspeed.runtime.config.DeepSpeedConfig(Noting(train_micro_batch_size_per_gpu=1))
    assert len(read) > 50
    assert read <= USED | NOT_HERE.keys()
    assert not USED & NOT_HERE.keys()


@pytest.mark.parametrize("key", NOT_HERE)
def test_sections_without_effect_are_refused_with_what_has_it(key: str) -> None:
    for off in (None, False, {}, {"enabled": False, "anything": 3}):
        assert key not in complete({key: off})
    for on in ({"enabled": True}, "on", 7):
        with pytest.raises(ConfigError, match=f"{key} has no effect here, and must be left out: {NOT_HERE[key][:20]}"):
            complete({key: on})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zero(9), "zero_optimization.stage is 9: must be 0, 1, 2 or 3"),
        (zero("3"), "zero_optimization.stage is '3': must be 0, 1, 2 or 3"),
        (zero(reduce_bucket_size="big"), "zero_optimization.reduce_bucket_size is 'big': input should be a valid int"),
        (zero(reduce_bucket_size=0), "zero_optimization.reduce_bucket_size is 0: input should be greater than 0"),
        (zero(offload_optimizer={"device": "gpu"}), "zero_optimization.offload_optimizer.device is 'gpu': input"),
        (zero(3, offload_param={"device": "nvme"}), "offload_param.nvme_path is missing"),
        (zero(2, offload_param={"device": "cpu"}), "offload_param is for stage 3, and stage is 2"),
        (zero(0, offload_optimizer={"device": "cpu"}), "offload_optimizer is for stages 1 to 3, and stage is 0"),
        (zero(cpu_offload=True), '"offload_optimizer": {"device": "cpu"}'),
        (zero(3, zero_quantized_weights=True), "zero_quantized_weights must be left out: gradients are exact here"),
        (zero(compute_grad_norm=False), "compute_grad_norm must stay on"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type 'OneBitAdam' does not run here; use Adam, AdamW"),
        ({"optimizer": {"type": "sgd"}}, "optimizer.type 'sgd' does not run here; use Adam, AdamW"),
        ({"optimizer": {}, "scheduler": {"params": {}}}, "scheduler.type is None; use WarmupLR"),
        ({"optimizer": {"type": "Adagrad"}} | zero(), "DeepSpeed splits it for one group of parameters only"),
        ({"optimizer": {"type": "Lamb"}} | zero(), "Lamb needs a GPU, and whole parameters, which ZeRO splits"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: weights stay fp32 here"),
        ({"bfloat16": {"enabled": True}}, "bfloat16.enabled: weights stay fp32 here"),
        ({"steps_per_print": "often"}, "steps_per_print is 'often': must be a whole number"),
        ({"optimizer": {"type": "AdamW", "params": 3}}, "optimizer.params is 3, and must be an object"),
        (
            zero(3, gather_16bit_weights_on_model_save=True, stage3_gather_fp16_weights_on_model_save=True),
            "Cannot provide deprecated parameter 'stage3_gather_fp16_weights_on_model_save' and replacing",
        ),
        ({"log_level": "loud"}, "log_level is 'loud': must be one of debug, info"),
        (
            zero(offload_optimizer={"device": "cpu"}) | {"zero_force_ds_cpu_optimizer": True},
            "zero_force_ds_cpu_optimizer is true, and with offload_optimizer the recipe's optimizer is PyTorch's",
        ),
        ({"aio": {"use_gds": True}}, "DeepSpeed refuses it: GDS"),
    ],
)
def test_what_deepspeed_refuses_is_one_line_before_a_run_starts(content: dict[str, Any], message: str) -> None:
    if torch.cuda.is_available() and "GDS" in message:
        pytest.skip("refused without GPUs only")
    with pytest.raises(ConfigError) as caught:
        complete_ds_config(content, CONFIG, None, bf16=False)
    assert str(caught.value).startswith("ds.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value), "each is found once"


def test_params_may_be_left_open() -> None:
    for params in (None, "auto", {}):
        ds = complete({"optimizer": {"type": "AdamW", "params": params}, "scheduler": {"type": "WarmupLR"}})
        assert ds["optimizer"]["params"] == {"lr": 3e-4, "weight_decay": CONFIG.optim.weight_decay}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it runs")
def test_lion_on_a_cpu_is_offloaded() -> None:
    lion = {"optimizer": {"type": "Lion"}}
    with pytest.raises(ConfigError, match='Lion needs a GPU or, under "zero_optimization", "offload_optimizer"'):
        complete(lion | zero())
    assert complete(lion | zero(offload_optimizer={"device": "cpu"}))


def test_encodings(tmp_path: Path) -> None:
    """PowerShell's `>` writes UTF-16, Notepad a mark before UTF-8."""
    path = tmp_path / "ds.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"):
        path.write_text('{"steps_per_print": 3}', encoding=encoding)
        assert read_ds_config(path) == {"steps_per_print": 3}
    path.write_bytes(b'{"a": "\xff\xfe\xfa"}')
    with pytest.raises(ConfigError, match="not text at byte 7: save it as UTF-8"):
        read_ds_config(path)
    path.write_text('{"zero_optimization": {"stage": 1, "stage": 2}}')
    with pytest.raises(ConfigError, match="the key stage is there twice"):
        read_ds_config(path)


def train_with(_: TileGroup, contents: list[dict[str, Any]]) -> list[list[float]]:
    """Losses of an epoch under each ds.json."""
    from slidescale.engine.api import make_step
    from slidescale.engine.strategies.make import Optimizing
    from slidescale.engine.supervision.classes import CrossEntropy

    from support import equivalence

    case = equivalence.Case(strategy="zero")
    found = []
    for content in contents:
        model, mesh = equivalence.make_model(case), equivalence.mesh_for(case)
        ds = complete_ds_config(content, CONFIG, SCHEDULE, bf16=False, width=model.encoder.dim)
        optimizing = Optimizing.as_settings_say(CONFIG.optim, SCHEDULE, ds)
        step = make_step(model, optimizing, CrossEntropy((), 2), mesh=mesh, strategy="zero", ds_config=ds)
        step.follow(equivalence.FixedPlan(case.chunk, 0))
        found.append(equivalence.train(case, step))
    return found


def test_what_is_accepted_trains(world: Callable[..., World]) -> None:
    """Others' files; the recipe's optimizer with offload; optimizers that DeepSpeed has not tested."""
    contents = [hugging_face(2), hugging_face(3), zero(offload_optimizer={"device": "cpu"})]
    contents += [zero(1) | {"optimizer": {"type": kind}} for kind in ("SGD", "RMSprop")]
    for losses in world(2).run(train_with, contents):
        assert all(0 < loss < 10 for each in losses for loss in each)
        assert all(each != losses[0] for each in losses[3:]), "another optimizer, other losses"


def refused_by_deepspeed(_: TileGroup, content: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        train_with(_, [content])
    return str(caught.value)


def test_what_deepspeed_refuses_as_it_starts_is_one_line(world: Callable[..., World]) -> None:
    """It passes every check of settings: the class that takes them depends on others."""
    content = zero(1) | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "adamw_mode": True}}}
    for message in world(1).run(refused_by_deepspeed, content):
        assert message.startswith("ds.json: DeepSpeed refuses it: ")
        assert "adamw_mode" in message
        assert "\n" not in message


def test_operators_are_announced_before_they_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: not when they are in the folder already."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    from slidescale.engine.strategies.zero import _announcing_operators

    built: list[str] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def compile_it(builder: Any, verbose: bool = True) -> None:
        built.append(caplog.text)
        (tmp_path / builder.name / f"{builder.name}.so").touch()

    builder = mock.Mock(spec=["name"])
    builder.name = "cpu_adam"
    with caplog.at_level(logging.INFO, "slidescale"), mock.patch.object(OpBuilder, "jit_load", compile_it):
        for _ in range(2):
            with _announcing_operators():
                OpBuilder.jit_load(builder)
        assert OpBuilder.jit_load is compile_it
    assert len(built) == 2
    assert built[0].count("DeepSpeed compiles its cpu_adam operator, once: about two minutes") == 1
    assert caplog.text.count("DeepSpeed compiles") == 1
