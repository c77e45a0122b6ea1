"""What a run logs to TensorBoard (curves, pictures, settings), and its progress bar."""

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

# Columns of the HPARAMS tab, whose table compares runs: those that every run has, and the largest number.
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
# Left out of that table: names and places, which TensorBoard shows anyhow, and what only changes the speed.
NOT_COMPARED: tuple[str, ...] = (
    "run.name",
    "run.out",
    "run.heatmaps",
    "run.kernels",
    "data.manifest",
    "data.readers",
    "data.prefetch",
    "data.classes",
    *(f"data.{name}_column" for name in ("slide", "case", "path", "label", "event", "split")),
    "model.weights",
    "memory.",
    "parallel.",
    "deepspeed_config",
    "local_rank",
    "resume",
)


def layout(headline: str) -> dict[str, dict[str, list[object]]]:
    """Charts of TensorBoard's CUSTOM SCALARS tab by category and title, in their order.

    Each chart has one curve per run: TensorBoard colours curves by run, so that two curves of a run would look alike.

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
    """Select the settings for the HPARAMS tab: a handful that every run has, then what differs from its default.

    Args:
        settings: by dotted name.
        defaults: of the same settings.

    Returns:
        At most `MOST_SETTINGS` settings.
    """
    changed = [name for name, value in settings.items() if value != defaults[name]]
    names = [name for name in CORE_SETTINGS if name in settings]
    names += [name for name in changed if name not in names and not name.startswith(NOT_COMPARED)]
    return {name: settings[name] for name in names[:MOST_SETTINGS]}


class RunLog:
    """TensorBoard's writer and the progress bar of a run; silent on all ranks except the main one.

    Args:
        folder: folder for TensorBoard's event files.
        slides: number of slides that the whole run trains on, for the progress bar.
        done: how many of them were trained on before a resume.
        step: optimizer steps taken before a resume.
        again: whether the scalars of that last step, and of the epoch that ended with it, will be logged again. What
            the interrupted run logged for it is dropped, and so are all later steps.
    """

    def __init__(self, folder: Path, *, main: bool, slides: int, done: int, step: int, again: bool = False) -> None:
        self._board = SummaryWriter(folder, purge_step=step + (not again)) if main else None
        self._begins = step == 0
        # A bar that is not on a terminal would fill a log file with its redrawings; one line per epoch is enough there.
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
        """Log the settings of a run: a page in the TEXT tab, and a row in the HPARAMS tab, which compares runs.

        Only where the run begins: a run that is resumed has the same settings, and they are in its log already.

        Args:
            settings: by dotted name.
            defaults: of the same settings.
            metrics: names of scalars whose latest values are the results in that row; they may still be to come.
            headline: the metric that chooses the best epoch.
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
        """Mark the run as finished in the HPARAMS tab."""
        if self._board:
            _, _, end = hparams({}, {})
            self._board._get_file_writer().add_summary(end)

    def flush(self) -> None:
        """Write everything out, for a viewer to see."""
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """Close the bar and the event files."""
        self.bar.close()
        if self._board:
            self._board.close()


def _table(settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    """A Markdown table with one row per setting."""
    rows = [f"| {name} | {_cell(value)} | {_cell(defaults[name])} |" for name, value in settings.items()]
    return "\n".join(["| setting | value | default |", "| --- | --- | --- |", *rows])


def _cell(value: Any) -> str:
    """A value as the text of a cell, without the characters that would end the cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")
