"""`slidescale export`: the fine-tuned encoder for use without this project, as a state dict that timm loads."""

import errno
import json
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from slidescale.engine.commands.requests import ExportRequest
from slidescale.engine.commands.trained import TrainedRun, load_run
from slidescale.engine.errors import ConfigError, UserError
from slidescale.engine.files import check_output, replacing, write_json
from slidescale.engine.models.backbone import timm_recipe
from slidescale.engine.models.custom import is_custom
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.lora import merge_adapters
from slidescale.engine.training.weights import WEIGHTS

log = logging.getLogger(__name__)


def export_encoder(request: ExportRequest) -> None:
    """Write the encoder and its description.

    Raises:
        UserError: the run cannot be used, or the files cannot be written.
    """
    run = load_run(request.run, torch.device("cpu"), encoder_weights=request.weights)
    if is_custom(run.config.model.encoder):
        raise ConfigError(
            f"{request.run}: its encoder, {run.config.model.encoder}, is not one that timm can build; its weights are "
            f"in {run.folder / WEIGHTS}, under names that begin with encoder.backbone."
        )
    backbone = run.model.encoder.backbone
    merge_adapters(backbone)
    about = describe(run, request.out.name)
    # safetensors keeps text only.
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    sidecar = request.out.with_suffix(".json")
    try:
        _check_places(request, run, sidecar)
        with replacing(request.out) as unfinished:
            save_file({name: value.contiguous() for name, value in backbone.state_dict().items()}, unfinished, metadata)
        write_json(sidecar, about)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own, for a full disk, say
        raise UserError(f"cannot write {request.out}: {error}") from None
    log.info("%s in %s; how to load it: %s", run.config.model.encoder, request.out, sidecar)


def _check_places(request: ExportRequest, run: TrainedRun, sidecar: Path) -> None:
    """Refuse to write over inputs, and over anything but an earlier export.

    Raises:
        OSError: says what is there.
    """
    weights = [path for path in (request.weights, run.config.model.weights) if path is not None]
    inputs = [*(run.folder / name for name in ("config.json", WEIGHTS)), *weights]
    check_output(request.out, inputs)
    check_output(sidecar, inputs, begins=b'{\n  "timm_name"')
    if request.out.exists() and not sidecar.exists():
        raise FileExistsError(
            errno.EEXIST, f"is there, and is no earlier export, for {sidecar} is not", str(request.out)
        )


def describe(run: TrainedRun, file_name: str) -> dict[str, Any]:
    """Everything needed to use the encoder, with the lines of Python that load and call it."""
    config, encoder = run.config, run.model.encoder
    assert isinstance(encoder, Encoder), "a trained run has its encoder, also a frozen one"
    name, options = timm_recipe(encoder.name, config.data.tile_px)
    mean, std = ([round(value, 6) for value in each.tolist()] for each in (encoder.prepare.mean, encoder.prepare.std))
    arguments = "".join(f", {key}={_source(value)}" for key, value in options.items())
    features = ["features = encoder((tiles / 255 - mean) / std)  # tiles: uint8 [n, 3, tile_px, tile_px]"]
    if encoder.prefix_tokens is not None:
        features.append(f"features = torch.cat([features[:, 0], features[:, {encoder.prefix_tokens}:].mean(1)], dim=1)")
    return {
        "timm_name": name,
        "timm_version": timm.__version__,
        "options": {key: _source(value) if callable(value) else value for key, value in options.items()}
        | {"num_classes": 0},
        "features": encoder.dim,
        "tile_px": config.data.tile_px,
        "mpp_um": config.data.mpp_um,
        "mean": mean,
        "std": std,
        "input": "RGB tiles of tile_px pixels at mpp_um µm per pixel, scaled to 0..1, less mean, divided by std, "
        "channel by channel",
        "trained_by": run.title,
        "python": [
            "import timm, torch",
            f"encoder = timm.create_model({name!r}, num_classes=0{arguments}, checkpoint_path={file_name!r}).eval()",
            f"mean, std = torch.tensor({mean}).view(3, 1, 1), torch.tensor({std}).view(3, 1, 1)",
            *features,
        ],
    }


def _source(value: Any) -> str:
    """A constructor's option as Python's source, a layer by its full name."""
    if not callable(value):
        return repr(value)
    places = ((module, name) for module in (timm.layers, nn) for name in vars(module))
    return next(f"{module.__name__}.{name}" for module, name in places if vars(module)[name] is value)
