"""A K study: what it runs, what it goes on with, and what it makes of the runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slidescale.engine.commands.study import StudyConfig
from slidescale.engine.commands.study_picture import Point, draw_against_k
from slidescale.engine.commands.study_results import medians, show
from slidescale.engine.commands.study_runs import Outcome, arms_of, run_study
from slidescale.engine.config import Config, DataConfig, RunConfig
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.files import write_csv
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.history import add_epoch, read_history
from slidescale.engine.training.run_folder import open_run_folder, record_run

from support.tables import read_csv

BASE = Config(run=RunConfig(name="base", epochs=3), data=DataConfig(k=8))


def study(k: list[Any], *, config: Config = BASE, frozen: bool = False, **settings: Any) -> StudyConfig:
    return StudyConfig(k=tuple(k), frozen_encoder="test_resnet" if frozen else None, config=config, **settings)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


class Runner:
    """Stands in for training: a run whose loss falls with K, after as many epochs as asked for."""

    def __init__(self) -> None:
        self.runs: list[Config] = []
        self.stop_in: tuple[str, int] | None = None

    def __call__(self, config: Config) -> Path:
        self.runs.append(config)
        folder = config.run.out / config.run.name
        if not config.resume:
            folder = open_run_folder(config.run.out, config.run.name)
        record_run(folder, config, None, ("a", "b"), CrossEntropy((), 2))
        for epoch in range(len(read_history(folder)) + 1, config.run.epochs + 1):
            if self.stop_in == (config.run.name, epoch):
                raise KeyboardInterrupt
            last = folder / "checkpoints" / "last"
            last.mkdir(parents=True, exist_ok=True)
            (last / "progress.json").write_text('{"progress": {"unreported": null}}')
            tiles = 100.0 if config.data.k == "all" else float(config.data.k)
            add_epoch(
                folder,
                epoch,
                {
                    "train_loss": 1 / tiles + config.run.seed / 100 + 1 / epoch,
                    "val_loss": 0.5,
                    "val_auroc": None if config.run.seed == 9 else 1 - 1 / tiles,
                    "tiles_a_slide": tiles,
                    "seconds": 2.0,
                },
            )
        return folder


def test_every_arm_runs_with_every_seed_and_the_last_epoch_counts(tmp_path: Path) -> None:
    runner = Runner()
    outcomes = run_study(arms_of(study(["all", 16, 4, 16], frozen=True)), [0, 1], tmp_path, runner)
    assert [outcome.arm for outcome in outcomes] == ["frozen", "k-4", "k-16", "k-all"] * 2
    assert [config.data.k for config in runner.runs[:4]] == ["all", 4, 16, "all"]
    assert [config.run.seed for config in runner.runs] == [0] * 4 + [1] * 4
    assert outcomes[2].train_loss == pytest.approx(1 / 16 + 1 / 3), "that of the last epoch"
    assert outcomes[2].seconds == pytest.approx(6.0), "of all epochs"
    rows = read_csv(tmp_path / "study.csv")
    assert [row["arm"] for row in rows] == [outcome.arm for outcome in outcomes]
    assert float(rows[-1]["metric"]) == pytest.approx(0.99)


def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    arms = arms_of(study([4, 16]))
    runner = Runner()
    runner.stop_in = ("k-16-seed-0", 2)
    with pytest.raises(KeyboardInterrupt):
        run_study(arms, [0, 1], tmp_path, runner)
    again = Runner()
    outcomes = run_study(arms, [0, 1], tmp_path, again)
    assert [(config.run.name, config.resume) for config in again.runs] == [
        ("k-16-seed-0", True),
        ("k-4-seed-1", False),
        ("k-16-seed-1", False),
    ]
    assert outcomes == run_study(arms, [0, 1], tmp_path / "whole", Runner())


def test_runs_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    run_study(arms_of(study([4])), [0], tmp_path, Runner())
    other = replace(BASE, optim=replace(BASE.optim, lr=5e-4))
    with pytest.raises(UserError, match="--optim.lr was 0.0001 and is 0.0005"):
        run_study(arms_of(study([4], config=other)), [0], tmp_path, Runner())


def test_a_run_whose_last_epoch_was_not_validated_is_gone_on_with(tmp_path: Path) -> None:
    arms = arms_of(study([4]))
    run_study(arms, [0], tmp_path, Runner())
    folder = tmp_path / "k-4-seed-0"
    rows = (folder / "history.csv").read_text().splitlines()
    (folder / "history.csv").write_text("\n".join(rows[:-1]) + "\n")
    again = Runner()
    run_study(arms, [0], tmp_path, again)
    assert [config.resume for config in again.runs] == [True]
    (folder / "checkpoints" / "last" / "progress.json").write_text('{"progress": {"unreported": {"losses": [0.7]}}}')
    run_study(arms, [0], tmp_path, again)
    assert [config.resume for config in again.runs] == [True, True], "cut off before all of it was written"
    run_study(arms, [0], tmp_path, again)


@pytest.mark.parametrize("epochs", [2, 4])
def test_runs_of_another_length_are_not_taken_for_these(epochs: int, tmp_path: Path) -> None:
    """Learning rates fall by the length, so that a run of 3 epochs is not the first 3 of a run of 4."""
    run_study(arms_of(study([4])), [0], tmp_path, Runner())
    other = replace(BASE, run=replace(BASE.run, epochs=epochs))
    with pytest.raises(UserError, match=f"begun with --run.epochs 3, and that is {epochs}: .* another --run.name"):
        run_study(arms_of(study([4], config=other)), [0], tmp_path, Runner())


def test_the_frozen_arm_has_the_trained_arms_encoder_or_the_one_that_is_named(tmp_path: Path) -> None:
    weights = tmp_path / "uni.bin"
    model = replace(BASE.model, encoder="uni", weights=weights, drop_path=0.1)
    optim = replace(BASE.optim, layer_decay=0.7, encoder_lr_scale=0.1)
    config = replace(BASE, model=model, optim=optim)
    frozen, trained = arms_of(StudyConfig(k=(4,), config=config))
    assert (frozen.config.model.encoder, frozen.config.model.weights) == ("uni", weights)
    assert frozen.config.model.frozen and frozen.config.data.k == "all" and not trained.config.model.frozen
    named = StudyConfig(k=(4,), config=config, frozen_encoder="resnet50")
    model = arms_of(named)[0].config.model
    assert (model.encoder, model.pretrained, model.weights) == ("resnet50", True, None)
    with_file = StudyConfig(k=(4,), config=config, frozen_encoder="virchow", frozen_weights=weights)
    model = arms_of(with_file)[0].config.model
    assert (model.encoder, model.pretrained, model.weights) == ("virchow", False, weights)
    with pytest.raises(ConfigError, match="random weights"):
        StudyConfig(k=(4,), config=BASE)
    with pytest.raises(ConfigError, match="named --frozen-encoder"):
        StudyConfig(k=(4,), config=config, frozen_weights=weights)


def test_nonsense_is_refused() -> None:
    for settings in ({"seeds": (0, 1, 0)}, {"seeds": ()}, {"seeds": (-1,)}):
        with pytest.raises(ConfigError, match="--seeds"):
            study([4], **settings)
    for k in ([], [0]):
        with pytest.raises(ConfigError, match="--k"):
            study(k)


def test_seeds_are_counted_by_arm() -> None:
    """K beyond all slides' tiles is the bag of "all"."""
    points = [Point(arm, False, 100.0, value) for arm in ("k-1024", "k-all") for value in (0.7, 0.8, 0.9)]
    titles: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "suptitle", lambda self, text, **_: titles.append(text))
        draw_against_k(points, points, "auroc")
    assert "of 3 seeds" in titles[0]


def test_table_and_picture(tmp_path: Path) -> None:
    outcomes = run_study(arms_of(study([4, 16, "all"], frozen=True)), [0, 1, 2], tmp_path, Runner())
    header, _, *rows = cells(medians(outcomes, "AUROC"))
    by_name = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["K"] for row in by_name] == ["all", "4", "16", "all"]
    assert by_name[1]["train loss"] == "0.593 (0.583 to 0.603)"
    assert by_name[0]["trained"] == "frozen"
    picture = show(outcomes, "AUROC", tmp_path)
    assert picture.ndim == 3 and picture.std() > 10
    assert (tmp_path / "k_study.png").exists()
    board = EventAccumulator(str(tmp_path / "study")).Reload()
    events = board.Scalars("k_study/train_loss/end_to_end")
    assert [event.step for event in events] == [4, 16, 100]
    assert events[0].value == pytest.approx(0.5933, abs=1e-3)
    assert board.Tags()["images"] == ["k_study"]


def test_undefined_metrics_are_left_out(tmp_path: Path) -> None:
    outcomes = [*run_study(arms_of(study([4])), [0, 9], tmp_path, Runner())]
    assert cells(medians(outcomes, "AUROC"))[2][4] == "0.750 (0.750 to 0.750)"
    assert cells(medians(outcomes[1:], "AUROC"))[2][4] == "undefined"
    show(outcomes, "AUROC", tmp_path)
    assert isinstance(outcomes[1], Outcome) and outcomes[1].metric is None


def test_history_of_a_resumed_run_has_each_epoch_once(tmp_path: Path) -> None:
    for epoch, loss in ((1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5)):
        add_epoch(tmp_path, epoch, {"train_loss": loss, "val_auroc": None})
    assert read_history(tmp_path) == [
        {"epoch": 1.0, "train_loss": 3.0, "val_auroc": None},
        {"epoch": 2.0, "train_loss": 2.5, "val_auroc": None},
    ]
    write_csv(tmp_path / "history.csv", ("epoch",), [])
    assert read_history(tmp_path) == []
