"""`slidescale plan` takes a run's settings, and answers as a run plans."""

import json
import re
from pathlib import Path

import pytest
import torch
import tyro

from slidescale.engine.commands import cli
from slidescale.engine.commands.plan import PlanRequest
from slidescale.engine.commands.plan_answer import Answer, format_answer, make_plan
from slidescale.engine.config import Config, DataConfig, MemoryConfig, ModelConfig, RunConfig
from slidescale.engine.errors import ConfigError
from slidescale.engine.models.make import make_model
from slidescale.engine.parallel.mesh import Mesh
from slidescale.engine.strategies.held import Holding, optimizer_of
from slidescale.engine.training.plan import measure_model, plan_step
from slidescale.engine.units import GIB

SMALL = ["--model.encoder", "test_vit", "--data.tile-px", "160"]


def ask(*words: str) -> Answer:
    return make_plan(tyro.cli(PlanRequest, args=words))


def test_command_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--k", "5000", "--ranks", "4", "--device", "A100-40GB"]
    cli.main(["plan", *words, "--json"])
    answer = json.loads(capsys.readouterr().out)
    base = answer["base_bytes"]
    assert base["total"] == base["parameters"] + base["gradients"] + base["optimizer"] + base["buffers"]
    assert answer["peak_bytes"] == base["total"] + answer["step_bytes"]["total"] <= answer["budget_bytes"]
    assert answer["budget_bytes"] == answer["memory_bytes"] - answer["reserve_bytes"]
    assert answer["stored_chunks"] <= answer["chunks"] == -(-1250 // answer["chunk"])
    assert answer["largest_k"]["recompute"] > 5000 and answer["seconds"] > 0
    assert answer["settings"]["model"]["encoder"] == "test_vit" and answer["strategy"] == "ddp"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "10"], "--memory is missing"),
        (["--k", "0", "--memory", "1GiB"], "--k is 0"),
        (["--k", "10", "--memory", "1XB"], "--memory is '1XB'"),
        (["--k", "10", "--memory", "8GiB", "--memory.budget", "8GiB"], "give one"),
        (["--k", "10", "--device", "H900"], "must be one of A100-40GB"),
        (["--k", "10", "--memory", "8GiB", "--optimizer-offload"], "--optimizer-offload needs --strategy zero1"),
        (["--k", "10", "--memory", "8GiB", "--strategy", "zero2", "--parameter-offload"], "--parameter-offload needs"),
        (["--k", "10", "--memory", "8GiB", "--strategy", "ddp", "--parallel.strategy", "fsdp"], "give one"),
        (["--k", "10", "--memory", "8GiB", "--strategy", "zero3", "--deepspeed_config", "ds.json"], "give one"),
        (["--k", "10", "--memory", "8GiB", "--parallel.strategy", "zero"], "takes --deepspeed_config"),
        (["--k", "10", "--memory", "8GiB", "--strategy", "single", "--ranks", "2"], "single is one process"),
        (["--k", "10", "--memory", "8GiB", "--ranks", "6", "--parallel.tile-ranks", "4"], "--parallel.tile-ranks is 4"),
        (["--k", "10", "--memory", "8GiB", "--deepspeed_config", "none.json"], "cannot read none.json"),
        (["--k", "10", "--memory", "8GiB", "--model.encoder", "resnet1o"], "timm has no model"),
        (["--k", "9000", "--memory", "1.2GiB", *SMALL], r"does not fit.*a larger --memory$"),
        (["--k", "9000", "--memory.budget", "20MiB", *SMALL], r"does not fit.*a larger --memory.budget$"),
        (["--k", "10", "--memory", "1GiB", "--device", "cpu"], "--memory is 1.00 GiB, of"),
        (["--k", "10", "--memory", "8GiB", "--model.transformer-layers", "-1"], "--model.transformer-layers is -1"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", *words])
    assert str(caught.value).startswith("error: ") and re.search(message, str(caught.value))


@pytest.mark.parametrize("word", ["encoder", "policy", "chunk", "tile-px", "precision", "optimizer", "lora-rank"])
def test_flags_without_their_section_name_the_whole_ones(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--k", "3", "--memory", "8GiB", f"--{word}", "4"])
    assert f".{word}" in capsys.readouterr().err


def test_command_on_a_cpu_offloads_to_files() -> None:
    answer = ask(*SMALL, "--k", "1", "--memory", "4GiB", "--memory.policy", "offload", "--device", "cpu")
    assert answer.in_files == answer.plan.need.away > 0 and answer.on_host == 0
    table = format_answer(answer)
    assert "beside it, in files" in table and "on the host" not in table
    assert 1000 < answer.largest_k["recompute"] < 4 * GIB / (160 * 160 * 3), "pixels alone would fill it"


def test_settings_of_a_run_count(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--k", "5000", "--ranks", "4", "--device", "H100", "--parallel.tile-ranks", "2"]
    answer = ask(*words, "--data.k", "1000", "--optim.optimizer", "sgd", "--memory.policy", "keep")
    plan, parameters = answer.plan, answer.plan.job.footprint.parameters
    assert plan.k == 1000 and plan.stored == plan.chunks == -(-500 // plan.chunk)
    assert answer.state.optimizer == answer.state.gradients == 4 * parameters
    cli.main(["plan", *words])
    table = capsys.readouterr().out
    assert "K = 5,000 tiles, 4 ranks, ddp: 2,500 tiles per rank, 2 slides side by side" in table
    assert "peak" in table and "H100" in table
    frozen = ask("--k", "5000", "--memory.budget", "8GiB", *SMALL, "--model.frozen").plan
    assert frozen.budget == 8 * GIB and frozen.need.pixels == 4 * frozen.job.footprint.dim * 5000
    assert frozen.job.footprint.given and frozen.job.footprint.parameters < parameters


def test_a_ds_json_is_completed_as_for_a_run(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    words = [*SMALL, "--k", "100", "--ranks", "4", "--device", "H100"]
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    by_file = ask(*words, "--deepspeed_config", str(path))
    by_flag = ask(*words, "--strategy", "zero3", "--optimizer-offload")
    assert (by_file.holding, by_file.state, by_file.plan.job) == (by_flag.holding, by_flag.state, by_flag.plan.job)
    assert by_file.holding.strategy == "zero3" and by_file.on_host > 0
    ds = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "torch_autocast": {"enabled": False}}
    path.write_text(json.dumps(ds | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}))
    answer = ask(*words, "--optim.lr", "0.1", "--deepspeed_config", str(path))
    trained = 4 * answer.plan.job.footprint.trained
    assert not answer.bf16 and answer.state.optimizer == 2 * -(-trained // 4), "a copy and one moment"
    path.write_text(json.dumps({"gradient_clipping": 7.0}))
    with pytest.raises(ConfigError, match=r"gradient_clipping is 7.0 and --optim.clip is 1.0"):
        ask(*words, "--deepspeed_config", str(path))


def test_a_run_plans_as_the_command_does() -> None:
    config = Config(
        run=RunConfig(name="plan", precision="fp32"),
        data=DataConfig(tile_px=160, prefetch=2),
        model=ModelConfig(encoder="test_vit"),
        memory=MemoryConfig(budget="6GiB", policy="keep"),
    )
    answer = make_plan(PlanRequest(k=300, device="cpu", config=config))
    model = make_model(config, classes=2, bf16=False, kernels="torch")
    tiles = torch.zeros(0, 160, 160, 3, dtype=torch.uint8)
    footprint = measure_model(model, tiles, config.memory, k=300, mesh=Mesh())
    holding = Holding.of(config.parallel, "single", None, Mesh(), optimizer_of(config.optim, None))
    assert holding == answer.holding
    planned = plan_step(footprint, config.memory, holding, k=300, prefetch=2, mesh=Mesh())
    assert planned.job == answer.plan.job and planned.budget == answer.plan.budget == 6 * GIB
    assert (planned.chunk, planned.stored, planned.need) == (answer.plan.chunk, answer.plan.stored, answer.plan.need)
