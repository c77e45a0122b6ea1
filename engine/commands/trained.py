"""A trained run, as its folder holds it: config.json and model.safetensors are enough to have the model again.

Only a frozen encoder's weights are not in them: they are read from where the run's settings say that they are.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from slidescale.engine.commands.requests import Precision
from slidescale.engine.config import Config
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.models.make import make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.supervision.make import make_objective
from slidescale.engine.supervision.objective import Objective
from slidescale.engine.training.checkpoint import epoch_name
from slidescale.engine.training.frozen import fingerprint
from slidescale.engine.training.run_config import read_config
from slidescale.engine.training.run_folder import read_record
from slidescale.engine.training.weights import WEIGHTS, read_metadata, read_weights
from slidescale.kernels.dispatch import choose_kernels


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The best epoch of a run.

    Attributes:
        model: whole, on one device, in evaluation mode.
        config: all settings of the run.
        classes: names of what is predicted, as `Manifest.classes`.
        objective: the meaning of the model's logits.
        epoch: number of completed epochs.
        step: optimizer steps taken.
    """

    folder: Path
    model: SlideModel
    config: Config
    classes: tuple[str, ...]
    objective: Objective
    epoch: int
    step: int

    @property
    def title(self) -> str:
        """The model in words."""
        return f"{self.config.model.encoder} of run {self.folder.resolve().name}, epoch {self.epoch}"


def load_run(
    folder: Path, device: torch.device, precision: Precision = "fp32", encoder_weights: Path | None = None
) -> TrainedRun:
    """Build the model of a run and give it the weights of its best epoch, whatever strategy it was trained under.

    Args:
        folder: the run's, `runs/<name>`.
        precision: arithmetic of matrix products. "fp32" is full fp32: the TF32 of NVIDIA's GPUs is turned off as well,
            for the whole process.
        encoder_weights: file of a frozen encoder's weights, in place of the one that the run's settings name.

    Raises:
        UserError: there is no such run, no epoch of it is finished, its files do not belong together, another version
            wrote it, or a frozen encoder's weights are not there or not those that it had.
    """
    record = read_record(folder, "objective", "frozen_encoder", "versions")
    config = read_config(record["config"], folder / "config.json", str(record["versions"].get("slidescale")))
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UserError(_no_weights(folder))
    try:
        metadata = read_metadata(weights)  # its checksum is compared as the tensors are read
        epoch, step = int(metadata["epoch"]), int(metadata["step"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{weights} is damaged, or not written by slidescale: {error}") from None
    best = folder / "checkpoints" / "best"
    if best.exists() and best.resolve().name != epoch_name(epoch):
        raise UserError(
            f"{weights} is of epoch {epoch}, and {best} is {best.resolve().name}: the run was killed as it wrote them; "
            "continue it with --resume, which puts them in order"
        )
    if device.type == "cuda" and precision == "fp32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    objective = make_objective(record["objective"]).to(device)
    untrained = dataclasses.replace(config, memory=dataclasses.replace(config.memory, checkpoint_blocks=False))
    if encoder_weights is not None and not config.model.frozen:
        raise ConfigError(f"--weights is {encoder_weights}: the encoder of {folder} is not frozen, and has its own")
    # The same structure without its starting weights, which may be gone; a frozen encoder has no others.
    if not config.model.frozen or encoder_weights is not None:
        untrained = dataclasses.replace(
            untrained, model=dataclasses.replace(config.model, pretrained=False, weights=encoder_weights)
        )
    source = untrained.model.weights
    if source is not None and not source.is_file():
        raise UserError(
            f"{folder} has a frozen encoder, whose weights are not in {source}: name their file by --weights"
        )
    model = make_model(
        untrained, classes=objective.outputs, bf16=precision == "bf16", kernels=choose_kernels("auto", device)
    ).to(device)
    if config.model.frozen and fingerprint(model.encoder) != record["frozen_encoder"]:
        raise UserError(
            f"{folder} has a frozen encoder, {config.model.encoder}, of other weights than "
            f"{source or 'timm publishes'} has now: bring those back"
        )
    trained = model.without_encoder() if config.model.frozen else model
    state = read_weights(weights, device)
    if different := sorted(trained.state_dict().keys() ^ state.keys()):
        raise UserError(
            f"{weights} and the model that {folder / 'config.json'} describes do not have the same parts: "
            f"{', '.join(different[:5])}{' …' if len(different) > 5 else ''}; the run needs the versions of slidescale "
            "and timm that config.json names"
        )
    try:
        trained.load_state_dict(state)
    except RuntimeError as error:  # sizes that differ
        raise UserError(f"{weights} does not fit the model of {folder / 'config.json'}: {error}") from None
    return TrainedRun(
        folder=folder,
        model=model.eval(),
        config=config,
        classes=record["classes"],
        objective=objective,
        epoch=epoch,
        step=step,
    )


def _no_weights(folder: Path) -> str:
    if (folder / "checkpoints" / "last").exists():
        return (
            f"{folder} has checkpoints and no {WEIGHTS}, which is written when an epoch proves the best: continue the "
            "run with --resume (and more --run.epochs, if it was finished by a version that wrote none)"
        )
    return f"{folder} is unfinished: it has no {WEIGHTS}, which is written when its first epoch is validated"
