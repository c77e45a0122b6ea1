"""Runs that are cut off and go on: what they leave is what an uninterrupted run leaves."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slidescale.engine.commands import recipe as main
from slidescale.engine.config import (
    Config,
    OptimConfig,
    ParallelConfig,
)
from slidescale.engine.data.manifest import read_manifest
from slidescale.engine.errors import UserError
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.training.checkpoint import Checkpoints
from slidescale.engine.training.checksums import read_signed, write_signed
from slidescale.engine.training.history import read_history
from slidescale.engine.training.run_folder import check_same_settings, find_run_folder
from slidescale.engine.training.run_slides import check_same_slides
from slidescale.engine.training.trainer import Trainer

from support.grids import full
from support.runs import make_config, rows_of, weights_in
from support.tables import edit_manifest, read_csv
from support.worlds import World


def config_of(manifest: Path, out: Path, epochs: int, **settings: Any) -> Config:
    """With a learning rate at which epochs differ."""
    return make_config(manifest, out, epochs=epochs, optim=OptimConfig(lr=1e-3), **settings)


@pytest.fixture
def run_whole(demo_manifest: Path, made_once: Callable[..., Path]) -> Callable[[int], Path]:
    """Return the folder of a run of so many epochs that nothing cut off; not to be changed."""
    return lambda epochs: made_once(
        f"whole-{epochs}", lambda folder: main.run(config_of(demo_manifest, folder, epochs))
    )


def test_resumed_run_equals_an_uninterrupted_one(
    run_whole: Callable[[int], Path], demo_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_whole(3)
    config = config_of(demo_manifest, tmp_path / "cut", 3)
    original = Trainer._train_epoch

    def power_cut(self: Trainer, epoch: int, step: int) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return original(self, epoch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", power_cut)
        with pytest.raises(KeyboardInterrupt):
            main.run(config)
    folder = main.run(config_of(demo_manifest, tmp_path / "cut", 3, resume=True))
    assert folder == tmp_path / "cut" / "t"
    expected, found = weights_in(whole), weights_in(folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_csv(whole / "predictions.csv") == read_csv(folder / "predictions.csv")


def steps_of(folder: Path) -> dict[str, list[int]]:
    """Of each of TensorBoard's curves, the steps that it has a value at."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("where", "epochs", "killed"),
    [
        ("_write_results", 3, 1),
        *full(("evaluate", 3, 2), ("_report", 1, 1), ("evaluate", 1, 1), ("mark_reported", 3, 2)),
    ],
)
def test_an_epoch_whose_validation_was_cut_off(
    run_whole: Callable[[int], Path],
    demo_manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    epochs: int,
    killed: int,
) -> None:
    """A resume validates it first, from the totals in its checkpoint; history, the best epoch and TensorBoard's curves
    are the same then. What it finds is what was on disk at that moment, as after a SIGKILL.
    """
    whole = run_whole(epochs)
    config = config_of(demo_manifest, tmp_path / "cut", epochs)
    owner = Checkpoints if where == "mark_reported" else Trainer
    original, calls = getattr(owner, where), []

    def power_cut(*args: Any, **settings: Any) -> Any:
        calls.append(where)
        if len(calls) == killed:
            shutil.copytree(tmp_path / "cut", tmp_path / "killed", symlinks=True)
            raise KeyboardInterrupt
        return original(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, power_cut)
        with pytest.raises(KeyboardInterrupt):
            main.run(config)
    config = replace(config, run=replace(config.run, out=tmp_path / "killed"))
    folder = tmp_path / "killed" / "t"
    assert (folder / "checkpoints" / "last").resolve().name == f"epoch-{killed:04d}"
    assert len(read_history(folder)) == killed - (where in ("evaluate", "_report")), "no row yet"
    if where == "_report":  # the epoch was marked best, by a score that rounds otherwise on other ranks, say
        progress = folder / "checkpoints" / "best" / "progress.json"
        content, _ = read_signed(progress)
        content["progress"]["best_score"][-1] += 1e-9
        write_signed(progress, content)
    time.sleep(1.1)  # TensorBoard reads event files in the order of their names, which begin with the second
    main.run(replace(config, resume=True))
    assert steps_of(folder) == steps_of(whole)
    assert len(rows_of(whole)) == epochs
    assert rows_of(folder) == rows_of(whole)
    links = {name: (whole / "checkpoints" / name).resolve().name for name in ("best", "last")}
    assert {name: (folder / "checkpoints" / name).resolve().name for name in links} == links
    expected, found = load_file(whole / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name in ("predictions.csv", "metrics.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def run_cut_off_and_resume(group: TileGroup, config: Config) -> None:
    """Three runs in one world: one whole; one that all ranks leave in its first validation; and that one resumed."""
    main.run(config)
    cut = replace(config, run=replace(config.run, name="cut"))
    with mock.patch.object(Trainer, "evaluate", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        main.run(cut)
    main.run(replace(cut, resume=True))


@pytest.mark.parametrize("strategy", ["ddp", *full("fsdp", "zero2", "zero3")])
def test_runs_follow_each_other_in_one_world(
    demo_manifest: Path, tmp_path: Path, world: Callable[..., World], strategy: str
) -> None:
    """As those of a study do; and on several ranks, too, a resume validates what was cut off."""
    config = make_config(demo_manifest, tmp_path, name="whole")
    if strategy.startswith("zero"):
        ds = tmp_path / "ds.json"
        ds.write_text(json.dumps({"zero_optimization": {"stage": int(strategy[-1])}}))
        config = replace(config, deepspeed_config=ds)
    else:
        config = replace(config, parallel=ParallelConfig(strategy="ddp" if strategy == "ddp" else "fsdp"))
    world(2).run(run_cut_off_and_resume, config)
    assert len(rows_of(tmp_path / "whole")) == 2
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert read_csv(tmp_path / "cut" / "predictions.csv") == read_csv(tmp_path / "whole" / "predictions.csv")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_nothing_to_resume(demo_manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run .* with a checkpoint"):
        main.run(make_config(demo_manifest, tmp_path, resume=True))


def test_a_resume_names_the_damaged_checkpoint_and_goes_on_from_the_one_before(
    trained_run: Path, demo_manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained_run.parent, tmp_path / "runs", symlinks=True)
    folder = tmp_path / "runs" / "t"
    before = weights_in(folder)
    state = folder / "checkpoints" / "last" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with caplog.at_level(logging.INFO):
        main.run(make_config(demo_manifest, tmp_path / "runs", resume=True))
    assert "epoch-0002 cannot be used: state.pt has other content than was written" in caplog.text
    assert "resumed after epoch 1 " in caplog.text and f", from {folder / 'checkpoints' / 'epoch-0001'}" in caplog.text
    after = weights_in(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows_of(folder) == rows_of(trained_run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [row | {"split": {"train": "val", "val": "train"}[row["split"]]} for row in rows],
            r"12 of 12 slides are in another split: slide-\d+ \(\w+, now \w+\), .*, …$",
        ),
        (
            lambda rows: [rows[0] | {"label": {"mutant": "wild_type"}.get(rows[0]["label"], "mutant")}, *rows[1:]],
            r"1 of 12 slides have another label: slide-\d+ \((wild_type, now mutant|mutant, now wild_type)\)$",
        ),
        (lambda rows: rows[:-1], r"1 of 11 slides are missing: slide-\d+$"),
        (
            lambda rows: [rows[0] | {"slide_id": "new"}, *rows[1:]],
            r"1 of 12 slides are new: new\n  1 of 12 slides are missing: slide-\d+$",
        ),
    ],
)
def test_a_resume_takes_no_other_slides(
    trained_run: Path, cohort_copy: Path, change: Callable[[list[dict[str, str]]], list[dict[str, str]]], message: str
) -> None:
    config = make_config(cohort_copy, trained_run.parent, resume=True)
    check_same_slides(trained_run, read_manifest(cohort_copy, config.data))  # the same, elsewhere
    edit_manifest(cohort_copy, change)
    with pytest.raises(UserError, match=message):
        main.run(config)


def test_a_run_that_recorded_no_slides_goes_on(
    trained_run: Path, demo_manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_manifest(demo_manifest, make_config(demo_manifest, tmp_path).data)
    check_same_slides(tmp_path, manifest)
    assert "has no slides.json" in caplog.text
    (tmp_path / "slides.json").write_bytes((trained_run / "slides.json").read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read .*slides.json"):
        check_same_slides(tmp_path, manifest)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": 3, "classes": []}', '{"config": {}}'])
def test_a_resume_with_a_damaged_record_is_refused_in_a_line(
    demo_manifest: Path, tmp_path: Path, trained_run: Path, text: str
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "checkpoints").symlink_to(trained_run / "checkpoints")
    (tmp_path / "t" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^cannot read .*config.json: [^\n]*$"):
        find_and_check(make_config(demo_manifest, tmp_path, resume=True))


def find_and_check(config: Config) -> None:
    check_same_settings(find_run_folder(config.run.out, config.run.name), config)
