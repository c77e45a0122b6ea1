"""The command as users type it: ranks, output, errors, and the loss of a rank."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.launches import PATIENCE_S, ROOT, SMALL, environment, losses
from support.recipes import start
from support.slides import damage
from support.tables import edit_manifest, read_csv
from support.worlds import free_port

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


def words_for(manifest: Path, out: Path, *extra: str) -> list[str]:
    """The recipe's words."""
    return ["--data.manifest", str(manifest), "--run.out", str(out), *SMALL, *extra]


def command(manifest: Path, out: Path, *extra: str, ranks: int) -> list[str]:
    """The recipe under `deepspeed`."""
    recipe = ["recipes/egfr.py", *words_for(manifest, out, *extra)]
    launcher = [DEEPSPEED, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*launcher, *recipe, "--deepspeed_config", "ds.json"]


def launch(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.fixture
def with_real_slide(cohort_copy: Path, real_slide: Path) -> Path:
    """A few drawn slides, one damaged inside, and the real one, in the train split."""
    row = {"slide_id": "real", "case_id": "real", "path": str(real_slide), "label": "mutant", "split": "train"}

    def change(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        cases = sorted({row["case_id"] for row in rows if row["split"] == "val"})
        return [row, *(old | {"split": "test"} if old["case_id"] == cases[0] else old for old in rows)]

    edit_manifest(cohort_copy, change)
    damage(cohort_copy.parent / "slides" / "slide-000.svs")
    return cohort_copy


@pytest.mark.full
def test_two_ranks_train_as_one_process_does(with_real_slide: Path, tmp_path: Path) -> None:
    """Deepspeed on 2 ranks and plain Python: the same bags, the same losses; each line of output once; a resume."""
    out = tmp_path / "runs"
    two = launch(command(with_real_slide, out, "--run.name", "two", "--run.epochs", "1", ranks=2))
    assert two.returncode == 0, two.stdout + two.stderr
    output = two.stdout + two.stderr
    for once in ("run .*two on 2 × cpu", "epoch  1/1", "results in"):
        assert len(re.findall(once, output)) == 1, output
    assert "zero2" in output
    start("egfr", *words_for(with_real_slide, out, "--run.name", "one", "--run.epochs", "1"))
    ours, theirs = losses(out / "one"), losses(out / "two")
    assert len(ours) > 6
    # Adam turns rounding into steps where a gradient is near zero, so the two drift apart, slowly.
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert max(ours) / min(ours) > 1.05, "and the losses are not all one"
    for name in ("predictions.csv", "predictions_test.csv"):
        one_rows, two_rows = read_csv(out / "one" / name), read_csv(out / "two" / name)
        assert len(one_rows) == len(two_rows) > 0
        for one_row, two_row in zip(one_rows, two_rows, strict=True):
            assert float(one_row["probability_mutant"]) == pytest.approx(float(two_row["probability_mutant"]), abs=1e-3)
    for run in ("one", "two"):
        assert [row["slide_id"] for row in read_csv(out / run / "excluded.csv")] == ["slide-000"]

    resumed = launch(command(with_real_slide, out, "--run.name", "two", "--run.epochs", "2", "--resume", ranks=2))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed after epoch 1" in resumed.stdout + resumed.stderr
    assert (out / "two" / "checkpoints" / "last").resolve().name == "epoch-0002"
    again = words_for(with_real_slide, out, "--run.name", "two", "--run.epochs", "2", "--resume")
    with pytest.raises(SystemExit, match="--optim.lr was 0.0001 and is 0.5"):
        start("egfr", *again, "--optim.lr", "0.5")
    with pytest.raises(SystemExit, match="written by zero2 on 2 ranks, and this run is single or ddp"):
        start("egfr", *again)


def test_losing_a_rank_ends_the_run(demo_manifest: Path, tmp_path: Path) -> None:
    """The survivor does not wait for the dead."""
    log = tmp_path / "log"
    with log.open("w") as file:
        words = command(demo_manifest, tmp_path / "runs", "--run.epochs", "1000", ranks=2)
        port = words[words.index("--master_port") + 1]
        launcher = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while "epoch  1/1000" not in log.read_text():
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        ranks = [
            process
            for process in psutil.Process(launcher.pid).children(recursive=True)
            if "--local_rank=1" in process.cmdline()
        ]
        assert ranks
        os.kill(ranks[0].pid, signal.SIGKILL)
        assert launcher.wait(PATIENCE_S) != 0
        assert "return code = -9" in log.read_text()
        assert not any(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "DeepSpeed shares no memory between ranks"
    finally:
        for process in [*psutil.Process(launcher.pid).children(recursive=True)] if launcher.poll() is None else []:
            process.kill()
        launcher.kill()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.encoder", "resnet5O"], "timm has no model 'resnet5O'; near: "),
        pytest.param(
            ["--optim.clip", "-1"], "--optim.clip is -1.0: must be 0 or a norm", marks=pytest.mark.full, id="clip"
        ),
    ],
)
def test_an_error_is_told_once(demo_manifest: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    done = launch(command(demo_manifest, tmp_path, *extra, ranks=2))
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert output.count(message) == 1, output
    assert "Traceback" not in output


def test_a_mistyped_setting_has_near_matches(
    demo_manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        start("egfr", *words_for(demo_manifest, tmp_path, "--optim.rl", "1e-3"))
    output = "".join(capsys.readouterr())
    assert "--optim.rl" in output and "--optim.lr" in output


def test_a_contradiction_with_ds_json_is_an_error(demo_manifest: Path, tmp_path: Path) -> None:
    ds = tmp_path / "mine.json"
    ds.write_text('{"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}')
    with pytest.raises(SystemExit, match="optimizer.params.lr is 0.5 and --optim.lr is 0.0001"):
        start("egfr", *words_for(demo_manifest, tmp_path, "--deepspeed_config", str(ds)))
    assert not any(tmp_path.glob("egfr*")), "nothing was started"


def torchrun(ranks: int, manifest: Path, out: Path, *extra: str) -> list[str]:
    """The recipe under torchrun."""
    recipe = ["recipes/egfr.py", *words_for(manifest, out, *extra)]
    meet = [f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    return [sys.executable, "-m", "torch.distributed.run", *meet, *recipe]


def test_torchrun_and_a_resume_on_other_ranks(demo_manifest: Path, tmp_path: Path) -> None:
    """FSDP2, two slides side by side; then one rank that takes them one after another, and the same as one process."""
    fsdp = ["--parallel.strategy", "fsdp", "--run.name", "fsdp", "--optim.optimizer", "sgd"]
    side_by_side = [*fsdp, "--parallel.tile-ranks", "1", "--parallel.fsdp-shard", "tiles", "--run.epochs", "1"]
    first = launch(torchrun(2, demo_manifest, tmp_path, *side_by_side))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "fsdp, 2 slides per step" in first.stderr
    assert len(re.findall("planned peak", first.stderr)) == 1
    after = [*fsdp, "--optim.accumulate", "2", "--run.epochs", "2", "--resume"]
    second = launch(torchrun(1, demo_manifest, tmp_path, *after))
    assert second.returncode == 0, second.stdout + second.stderr
    single = ["--run.name", "single", "--optim.optimizer", "sgd"]
    start("egfr", *words_for(demo_manifest, tmp_path, *single, "--run.epochs", "1", "--optim.accumulate", "2"))
    steps = len(losses(tmp_path / "single"))
    found = losses(tmp_path / "fsdp")
    assert len(found) == 2 * steps
    # The same schedule only as far as that of the first run went, one epoch.
    assert found[:steps] == pytest.approx(losses(tmp_path / "single"), rel=1e-5)
    with pytest.raises(SystemExit, match="the run was begun with 2 slides per step, and this is 1"):
        start("egfr", *words_for(demo_manifest, tmp_path, *single, "--resume"))


@pytest.mark.full
def test_policies_give_the_same_run(demo_manifest: Path, tmp_path: Path) -> None:
    """What becomes of activations does not change what is learnt; and the offload leaves nothing behind."""
    settings = ["--run.epochs", "1", "--model.drop-path", "0.2", "--model.transformer-layers", "1"]
    policies = ["recompute", "keep", "offload"]
    for name in policies:
        start("egfr", *words_for(demo_manifest, tmp_path, *settings, "--run.name", name, "--memory.policy", name))
    recompute, keep, offload = (losses(tmp_path / name) for name in policies)
    assert keep == pytest.approx(recompute, rel=1e-4)
    assert offload == pytest.approx(recompute, rel=1e-4)
    assert not any((tmp_path / "offload" / "offload").glob("*"))


def test_a_budget_that_is_too_small_is_told(demo_manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)^error: .*a bag of 10 tiles does not fit.*--memory.checkpoint-blocks"):
        start("egfr", *words_for(demo_manifest, tmp_path, "--memory.budget", "64MiB"))
