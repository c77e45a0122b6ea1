"""What TensorBoard finds of a run: its settings once, also when it is resumed, and results that are compared."""

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from slidescale.engine.logger import LAYOUT, RunLog

SETTINGS = {"run.name": "a|b", "optim.lr": 0.5, "data.k": "all", "data.classes": ["x", "y"], "optim.clip": None}
DEFAULTS = SETTINGS | {"optim.lr": 0.1}


def write(folder: Path, *, step: int, value: float) -> None:
    run_log = RunLog(folder, main=True, slides=4, done=0, step=step)
    run_log.hyperparameters(SETTINGS, DEFAULTS, ["best/auroc"])
    run_log.scalars({"best/auroc": value}, step + 1)
    run_log.close()


def tags(folder: Path) -> list[str]:
    """Of all values in all event files."""
    events = [event for path in sorted(folder.glob("events*")) for event in EventFileLoader(str(path)).Load()]
    return [value.tag for event in events for value in event.summary.value]


def test_settings_are_told_once(tmp_path: Path) -> None:
    write(tmp_path, step=0, value=0.6)
    time.sleep(1.1)  # TensorBoard reads event files in the order of their names, which begin with the second
    write(tmp_path, step=5, value=0.8)
    found = tags(tmp_path)
    for tag in ("settings/text_summary", metadata.SESSION_START_INFO_TAG, metadata.EXPERIMENT_TAG):
        assert found.count(tag) == 1
    board = EventAccumulator(str(tmp_path)).Reload()
    values = [event.value for event in board.Scalars("best/auroc")]
    assert values == pytest.approx([0.6, 0.8]), "the latest is what the HPARAMS tab shows"


def test_settings_page(tmp_path: Path) -> None:
    """What was changed comes first."""
    write(tmp_path, step=0, value=0.6)
    board = EventAccumulator(str(tmp_path)).Reload()
    (page,) = board.Tensors("settings/text_summary")
    changed, everything = page.tensor_proto.string_val[0].decode().split("## All")
    assert "| optim.lr | 0.5 | 0.1 |" in changed and "data.k" not in changed
    rows = [line for line in everything.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(SETTINGS)
    assert r"| run.name | a\|b | a\|b |" in rows


def test_hparams_tab(tmp_path: Path) -> None:
    write(tmp_path, step=0, value=0.6)
    board = EventAccumulator(str(tmp_path)).Reload()
    start = metadata.parse_session_start_info_plugin_data(
        board.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    assert start.hparams["optim.lr"].number_value == 0.5
    assert start.hparams["data.classes"].string_value == "['x', 'y']"
    assert set(start.hparams) == set(SETTINGS)
    experiment = metadata.parse_experiment_plugin_data(
        board.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    )
    assert [info.name.tag for info in experiment.metric_infos] == ["best/auroc"]


def test_custom_scalars_tab(tmp_path: Path) -> None:
    write(tmp_path, step=0, value=0.6)
    board = EventAccumulator(str(tmp_path)).Reload()
    (event,) = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [chart.title for chart in layout.category[0].chart] == list(LAYOUT["training"])


def test_end_of_a_run(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, main=True, slides=4, done=0, step=0)
    run_log.finished()
    run_log.close()
    assert tags(tmp_path).count(metadata.SESSION_END_INFO_TAG) == 1


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, main=False, slides=4, done=0, step=0)
    run_log.hyperparameters(SETTINGS, DEFAULTS, ["best/auroc"])
    run_log.finished()
    run_log.close()
    assert not list(tmp_path.iterdir())
