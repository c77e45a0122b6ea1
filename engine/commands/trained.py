"""A trained run, as its folder holds it: config.json and model.safetensors are enough to have the model again.

All but a frozen encoder, whose weights are not the run's: it is built from where its settings say that they are.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch

from slidescale.engine.commands.requests import Precision
from slidescale.engine.config import Config, flatten
from slidescale.engine.errors import ConfigError, UserError, near
from slidescale.engine.models.make import make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.supervision.objective import Objective, make_objective
from slidescale.engine.training.checkpoint import epoch_name
from slidescale.engine.training.frozen import fingerprint
from slidescale.engine.training.weights import WEIGHTS, read_metadata, read_weights
from slidescale.kernels.dispatch import choose_kernels

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The best epoch of a run.

    Attributes:
        model: whole, on one device, in evaluation mode.
        config: all settings of the run.
        classes: names of what is predicted, as `Manifest.classes`.
        objective: says what the model's logits mean.
        epoch: completed epochs, of which this is the last.
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
        folder: of the run, `runs/<name>`.
        precision: of matrix products. "fp32" is full fp32: also the TF32 of NVIDIA's GPUs is turned off, for the whole
            process.
        encoder_weights: of a frozen encoder, in place of those that the run's settings name.

    Raises:
        UserError: there is no such run, no epoch of it is finished, its files do not belong together, another version
            wrote it, or a frozen encoder's weights are not there or not those that it had.
    """
    record = _read_record(folder)
    config = read_config(record["config"], folder / "config.json", str(record.get("versions", {}).get("slidescale")))
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
    # Of the same structure, without its starting weights, which may be gone; a frozen encoder has no others.
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
        classes=tuple(record["classes"]),
        objective=objective,
        epoch=epoch,
        step=step,
    )


def read_config(settings: dict[str, Any], source: Path, version: str) -> Config:
    """The settings of a config.json; what it does not have is the default, as it was before there was such a setting.

    Args:
        version: of slidescale, that wrote it.

    Raises:
        UserError: it has settings that this version does not know, or values that it refuses.
    """
    unknown: list[str] = []
    try:
        config = _build(Config, settings, "", unknown)
    except ConfigError as error:
        raise UserError(f"{source} was written by slidescale {version}, and this version refuses: {error}") from None
    if unknown:
        known = list(Config(run=config.run).flat())
        lines = [name + near(name, known) for name in unknown]
        raise UserError(
            f"{source} was written by slidescale {version}, with settings that this version does not have:\n  "
            + "\n  ".join(lines)
            + f"\nuse slidescale {version}"
        )
    return config


def _build(kind: type[Settings], values: dict[str, Any], prefix: str, unknown: list[str]) -> Settings:
    hints = get_type_hints(kind)
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            unknown += flatten({prefix + name: value})
        elif dataclasses.is_dataclass(hints[name]):
            built[name] = _build(hints[name], value, f"{prefix}{name}.", unknown)
        else:
            built[name] = _from_json(value, hints[name])
    return kind(**built)


def _from_json(value: Any, hint: Any) -> Any:
    """JSON has lists for tuples, and text for paths."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in (hint, *get_args(hint)):
        return Path(value)
    return value


def _read_record(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        runs = [path.parent.name for path in folder.parent.glob("*/config.json")]
        raise UserError(f"there is no run {folder}" + near(folder.name, runs))
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("config", "classes", "objective", "frozen_encoder", "versions")}
    except FileNotFoundError:
        runs = sorted(str(found.parent) for found in folder.glob("*/config.json"))
        hint = f"; it holds the runs {', '.join(runs[:5])}" if runs else ""
        raise UserError(f"{folder} is not the folder of a run: it has no config.json{hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}") from None


def _no_weights(folder: Path) -> str:
    if (folder / "checkpoints" / "last").exists():
        return (
            f"{folder} has checkpoints and no {WEIGHTS}, which is written when an epoch proves the best: continue the "
            "run with --resume (and more --run.epochs, if it was finished by a version that wrote none)"
        )
    return f"{folder} is unfinished: it has no {WEIGHTS}, which is written when its first epoch is validated"
