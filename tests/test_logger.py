"""What TensorBoard finds of a run: its settings once, also when it is resumed, and results that are compared."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from slidescale.engine import logger
from slidescale.engine.commands import recipe as main
from slidescale.engine.commands.predict import PredictRequest, predict_slides
from slidescale.engine.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from slidescale.engine.logger import Meter
from slidescale.engine.supervision.make import KINDS
from slidescale.engine.training.run_log import CORE_SETTINGS, MOST_SETTINGS, RunLog, compared_settings
from slidescale.engine.training.stopwatch import PHASES

from support.runs import make_config

SETTINGS = {"run.name": "a|b", "optim.lr": 0.5, "data.k": "all", "data.classes": ["x", "y"], "optim.clip": None}
DEFAULTS = SETTINGS | {"optim.lr": 0.1}


def write(folder: Path, *, step: int, value: float) -> None:
    run_log = RunLog(folder, main=True, slides=4, done=0, step=step)
    run_log.hyperparameters(SETTINGS, DEFAULTS, ["best/auroc"], "auroc")
    run_log.scalars({"best/auroc": value}, step + 1)
    run_log.close()


def tags(folder: Path) -> list[str]:
    """Of all values in all event files."""
    events = [event for path in sorted(folder.glob("events*")) for event in EventFileLoader(str(path)).Load()]
    return [value.tag for event in events for value in event.summary.value]


def test_settings_are_logged_once(tmp_path: Path) -> None:
    write(tmp_path, step=0, value=0.6)
    # TensorBoard reads event files in the order of their names, which have the second.
    (first,) = tmp_path.glob("events*")
    words = first.name.split(".")
    words[3] = str(int(words[3]) - 10)
    first.rename(tmp_path / ".".join(words))
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


def hparams_of(folder: Path) -> tuple[list[str], list[str]]:
    """Names in the HPARAMS tab: settings, as TensorBoard has columns for them, and metrics."""
    board = EventAccumulator(str(folder)).Reload()
    content = board.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    content = board.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    names = [info.name for info in experiment.hparam_infos]
    assert set(names) == set(start.hparams)
    return names, [info.name.tag for info in experiment.metric_infos]


def test_hparams_tab(tmp_path: Path) -> None:
    """What every run is compared by, and what this one has otherwise than by default."""
    write(tmp_path, step=0, value=0.6)
    names, metrics = hparams_of(tmp_path)
    assert names == ["data.k", "optim.lr"] and metrics == ["best/auroc"]


def test_hparams_of_a_run_with_all_settings(tmp_path: Path) -> None:
    config = Config(
        run=RunConfig(name="t", out=tmp_path, heatmaps=0),
        data=DataConfig(manifest=tmp_path / "slides.csv", readers=4, case_column="patient", min_tissue=0.25),
        model=ModelConfig(encoder="uni", pretrained=True),
        optim=OptimConfig(lr=1e-3, layer_decay=0.8),
    )
    run_log = RunLog(tmp_path, main=True, slides=4, done=0, step=0)
    names = ["best/val_auroc", "best/val_loss"]
    run_log.hyperparameters(config.flat(), Config(run=RunConfig(name="t")).flat(), names, "auroc")
    run_log.close()
    settings, metrics = hparams_of(tmp_path)
    assert settings == [*CORE_SETTINGS, "data.min_tissue", "optim.layer_decay"]
    assert metrics == names
    changed = {name: f"other {value}" for name, value in config.flat().items()}
    assert len(compared_settings(changed, config.flat())) == MOST_SETTINGS


# The scalars of a run's last epochs, as the trainer writes them.
SCALARS = {
    "epoch/val_loss",
    "epoch/train_loss",
    "train/loss",
    "train/learning_rate",
    "train/learning_rate_encoder",
    "train/weight_decay",
    "train/gradient_norm",
    "train/gradient_norm_aggregator",
    "train/gradient_norm_encoder",
    "train/attention_entropy",
    "speed/tiles_per_s",
    "speed/data_wait_share",
    *(f"seconds/{phase.replace(' ', '_')}" for phase in PHASES),
}


@pytest.mark.parametrize("headline", sorted({kind.headline for kind in KINDS.values()}))
def test_custom_scalars_tab(headline: str, tmp_path: Path) -> None:
    """Validation comes first, and no chart has two curves of a run, to which TensorBoard gives one colour."""
    run_log = RunLog(tmp_path, main=True, slides=4, done=0, step=0)
    run_log.hyperparameters(SETTINGS, DEFAULTS, ["best/auroc"], headline)
    run_log.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Tensors("custom_scalars__config__")
    found = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in found.category] == ["validation", "training", "speed"]
    charts = [list(chart.multiline.tag) for category in found.category for chart in category.chart]
    assert charts[:2] == [[f"^val/{headline}$"], ["^epoch/val_loss$"]]
    written = {f"val/{headline}", *SCALARS}
    shown = [{tag for tag in written if re.search(pattern, tag)} for (pattern,) in charts]
    assert all(len(tags) == 1 for tags in shown)
    assert len(set().union(*shown)) == len(shown) == len(written)


def test_end_of_a_run(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, main=True, slides=4, done=0, step=0)
    run_log.finished()
    run_log.close()
    assert tags(tmp_path).count(metadata.SESSION_END_INFO_TAG) == 1


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, main=False, slides=4, done=0, step=0)
    run_log.hyperparameters(SETTINGS, DEFAULTS, ["best/auroc"], "auroc")
    run_log.finished()
    run_log.close()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What meters take for the time, in seconds: `now`, which goes on by itself by `step` a look."""
    clock = SimpleNamespace(now=0.0, step=0.0)

    def monotonic() -> float:
        clock.now += clock.step
        return clock.now

    monkeypatch.setattr(logger, "time", SimpleNamespace(monotonic=monotonic))
    return clock


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of a process that has no terminal."""
    monkeypatch.setattr(logging.getLogger("slidescale"), "propagate", True)
    caplog.set_level(logging.INFO, "slidescale")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    return caplog


def test_a_meter_without_a_terminal_has_a_line_a_minute(
    clock: SimpleNamespace, lines: pytest.LogCaptureFixture
) -> None:
    meter = Meter("epoch 3/20", 500, "slide", main=True)
    for done, now in ((1, 30.0), (10, 61.0), (11, 70.0), (60, 361.0), (490, 5000.0)):
        clock.now = now
        meter.reach(done, "loss 0.693")
    meter.close()
    assert lines.messages == [
        "epoch 3/20: 10 of 500 slides (2%), 9.8 slides/min, 50 min left, loss 0.693",
        "epoch 3/20: 60 of 500 slides (12%), 10.0 slides/min, 44 min left, loss 0.693",
        "epoch 3/20: 490 of 500 slides (98%), 5.9 slides/min, 2 min left, loss 0.693",
    ]


def test_a_meter_of_many_and_of_few(clock: SimpleNamespace, lines: pytest.LogCaptureFixture) -> None:
    for total, unit, done, now in (
        (2_000_000, "tile", 0, 60.0),
        (2_000_000, "tile", 90_000, 60.0),
        (9, "slide", 1, 9e3),
    ):
        clock.now = 0.0
        meter = Meter("predicting", total, unit, main=True)
        clock.now = now
        meter.reach(done)
    assert lines.messages == [
        "predicting: 0 of 2,000,000 tiles (0%), 0.0 tiles/h",
        "predicting: 90,000 of 2,000,000 tiles (4%), 1,500 tiles/s, 21 min left",
        "predicting: 1 of 9 slides (11%), 0.4 slides/h, 20 h 0 min left",
    ]


def test_other_ranks_meters_are_silent(clock: SimpleNamespace, lines: pytest.LogCaptureFixture) -> None:
    meter = Meter("predicting", 10, "tile", main=False)
    clock.now = 100.0
    assert list(meter.count(iter("abc"), 2)) == ["a", "b", "c"]
    assert not lines.messages


def test_a_share_is_counted_for_all_ranks(clock: SimpleNamespace, lines: pytest.LogCaptureFixture) -> None:
    meter = Meter("finding tissue", 5, "slide", main=True)
    clock.step = 60.0
    assert list(meter.count(iter("abc"), 2)) == ["a", "b", "c"]
    assert [line.split(" (")[0] for line in lines.messages] == [
        f"finding tissue: {done} of 5 slides" for done in (2, 4, 5)
    ]


def test_all_that_takes_long_reports(
    clock: SimpleNamespace, lines: pytest.LogCaptureFixture, demo_manifest: Path, tmp_path: Path
) -> None:
    """Of a training run, and of a prediction, as a log file has it."""
    clock.step = 61.0
    folder = main.run(make_config(demo_manifest, tmp_path, epochs=1))
    slides = sorted(demo_manifest.parent.glob("slides/*"))[:2]
    predict_slides(PredictRequest(run=folder, slides=tuple(slides), out=tmp_path / "p.csv"))
    for what in ("finding tissue: 12 of 12 slides", "epoch 1/1: ", "validating epoch 1: ", "predicting: "):
        assert any(line.startswith(what) for line in lines.messages), what
