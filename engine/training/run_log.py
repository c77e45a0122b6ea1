"""TensorBoard's side of a run: curves, pictures, settings; and the run's progress bar."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from slidescale.engine.supervision.make import headline_title
from slidescale.engine.training.stopwatch import PHASES

# Of the HPARAMS tab, whose table is for comparing runs: what every run has there, and how many more it may have.
CORE_SETTINGS = (
    "model.encoder",
    "model.pretrained",
    "model.frozen",
    "data.k",
    "data.tile_px",
    "data.mpp_um",
    "optim.lr",
    "optim.encoder_lr_scale",
    "run.epochs",
    "run.seed",
)


MOST_SETTINGS = 15


# Names and places, which TensorBoard shows anyhow, and what changes a run's speed alone.
NOT_COMPARED: tuple[str, ...] = (
    "run.name",
    "run.out",
    "run.heatmaps",
    "run.kernels",
    "data.manifest",
    "data.readers",
    "data.prefetch",
)


NOT_COMPARED += ("deepspeed_config", "local_rank", "resume", "memory.", "parallel.", "data.classes", "model.weights")


NOT_COMPARED += tuple(f"data.{name}_column" for name in ("slide", "case", "path", "label", "event", "split"))


def layout(headline: str) -> dict[str, dict[str, list[object]]]:
    """What TensorBoard's CUSTOM SCALARS tab shows, in its order: charts by category and title.

    Each chart has one curve a run. TensorBoard colours curves by their run, so that two of one run look alike.

    Args:
        headline: the metric that the best epoch is chosen by.
    """
    charts = {
        "validation": {
            f"{headline_title(headline)}, validation": f"val/{headline}",
            "loss, validation": "epoch/val_loss",
        },
        "training": {
            "loss, training": "train/loss",
            "loss, training, mean of each epoch": "epoch/train_loss",
            "learning rate of the aggregator": "train/learning_rate",
            "learning rate of the encoder": "train/learning_rate_encoder",
            "weight decay": "train/weight_decay",
            "gradient norm, before clipping": "train/gradient_norm",
            "gradient norm of the aggregator": "train/gradient_norm_aggregator",
            "gradient norm of the encoder": "train/gradient_norm_encoder",
            "attention entropy (1: all tiles alike, 0: one tile)": "train/attention_entropy",
        },
        "speed": {
            "tiles per second": "speed/tiles_per_s",
            "share of a step spent waiting for tiles": "speed/data_wait_share",
            **{f"seconds per step: {phase}": f"seconds/{phase.replace(' ', '_')}" for phase in PHASES},
        },
    }
    return {
        category: {title: ["Multiline", [f"^{tag}$"]] for title, tag in titles.items()}
        for category, titles in charts.items()
    }


def compared_settings(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings in the HPARAMS tab: a handful that every run has, then what differs from its default.

    Args:
        settings: by dotted name.
        defaults: of the same.

    Returns:
        At most `MOST_SETTINGS` of them.
    """
    changed = [name for name, value in settings.items() if value != defaults[name]]
    names = [name for name in CORE_SETTINGS if name in settings]
    names += [name for name in changed if name not in names and not name.startswith(NOT_COMPARED)]
    return {name: settings[name] for name in names[:MOST_SETTINGS]}


class RunLog:
    """The writers of a run; silent on all ranks but the main one.

    Args:
        folder: where TensorBoard's event files go.
        slides: that the whole run trains on, for the progress bar.
        done: of these, trained on before a resume.
        step: optimizer steps taken before a resume.
        again: of these, the last one's scalars, and those of the epoch that ended with it, will be logged again.
            What the run that was cut off has logged of them is dropped, and so are all later steps.
    """

    def __init__(self, folder: Path, *, main: bool, slides: int, done: int, step: int, again: bool = False) -> None:
        self._board = SummaryWriter(folder, purge_step=step + (not again)) if main else None
        self._begins = step == 0
        # A bar that is not on a terminal would fill a log file with its redrawings; epochs' lines tell enough there.
        self.bar = tqdm(
            total=slides,
            initial=done,
            unit="slide",
            smoothing=0,
            dynamic_ncols=True,
            leave=False,
            disable=not main or not sys.stderr.isatty(),
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write named values."""
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Write a uint8 `[H, W, 3]` picture."""
        if self._board:
            self._board.add_image(name, image, step, dataformats="HWC")

    def hyperparameters(
        self, settings: dict[str, Any], defaults: dict[str, Any], metrics: Sequence[str], headline: str
    ) -> None:
        """Tell a run's settings: a page in the TEXT tab, and a row in the HPARAMS tab, which compares runs.

        Only where the run begins: what resumes it has the same settings, and they have been told.

        Args:
            settings: by dotted name.
            defaults: of the same.
            metrics: names of scalars, whose latest values are that row's results; they may still be to come.
            headline: the metric that tells the best epoch.
        """
        if self._board is None or not self._begins:
            return
        changed = {name: value for name, value in settings.items() if value != defaults[name]}
        page = f"## Changed\n\n{_table(changed, defaults)}\n\n## All\n\n{_table(settings, defaults)}"
        self._board.add_text("settings", page, 0)
        self._board.add_custom_scalars(layout(headline))
        compared = compared_settings(settings, defaults)
        values = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in compared.items()}
        # Not SummaryWriter.add_hparams, which makes a second run of it in a folder of its own, and wants results now.
        experiment, start, _ = hparams(values, dict.fromkeys(metrics, 0.0))
        for summary in (experiment, start):
            self._board._get_file_writer().add_summary(summary)

    def finished(self) -> None:
        """Tell the HPARAMS tab that the run has come to its end."""
        if self._board:
            _, _, end = hparams({}, {})
            self._board._get_file_writer().add_summary(end)

    def flush(self) -> None:
        """Let a viewer see all that was written."""
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """End the bar and the event files."""
        self.bar.close()
        if self._board:
            self._board.close()


def _table(settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Markdown, a row a setting."""
    rows = [f"| {name} | {_cell(value)} | {_cell(defaults[name])} |" for name, value in settings.items()]
    return "\n".join(["| setting | value | default |", "| --- | --- | --- |", *rows])


def _cell(value: Any) -> str:
    """A value in a cell, whose borders would end it."""
    return str(value).replace("|", "\\|").replace("\n", " ")
