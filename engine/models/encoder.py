"""Tile encoders: any timm model, from uint8 tiles to one feature vector a tile."""

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.dropout import KeyedDropout, key_dropouts
from slidescale.engine.models.foundation import (
    FOUNDATION_MODELS,
    class_and_patch_tokens,
    create_foundation_model,
    find_foundation_model,
)
from slidescale.engine.models.lora import add_adapters
from slidescale.engine.models.packaged import ARCHITECTURE, PACKAGED_ENCODER, packaged_weights
from slidescale.engine.models.tile_prep import TilePrep
from slidescale.engine.models.trial import refusal, try_network, turn_off_dropout
from slidescale.engine.models.weight_file import own_names, read_weight_file
from slidescale.engine.process.substitute import substitute
from slidescale.kernels.dispatch import KernelName

log = logging.getLogger(__name__)


class Encoder(nn.Module):
    """A timm model that maps tiles uint8 `[n, H, W, 3]` to features `[n, D]`.

    Its BatchNorm layers stay in evaluation mode whatever mode the model is in: batch statistics would depend on
    how a slide is cut into chunks and would be updated twice by the two passes. Their scale and shift train.

    Dropout of timm's own is off, whatever its default: the one thing that is left out at random is a tile's residual
    block (`drop_path`). Where a network cuts tiles into windows, its layers see a tile's windows in a row, and all of
    them are left out or none.

    A few tiles without content go through the network as it is made (see `models/trial.py`).

    Args:
        name: a timm model name, e.g. "resnet50_gn" or "hf-hub:owner/model", one of the `FOUNDATION_MODELS`, or
            "efficientnet_lite0_packaged" (see `packaged.py`).
        tile_px: side of a tile in pixels; a model of fixed input size is built for it, if timm can.
        pretrained: load the published weights (from the hub or the local hub cache, or the package).
        weights: a local state dict (.pth, .bin, .safetensors) to load instead.
        drop_path: largest probability of leaving out a residual block for a tile (stochastic depth: Huang et al.
            2016); timm gives the deepest block this and the earlier ones less.
        lora_rank: rank of the adapters that are trained in place of the weights (see `models/lora.py`); 0: none.
        augment_symmetry: turn each training tile by a random symmetry of the square (see `TilePrep`).
        stain_jitter: strength of random changes of a training tile's stains, 0 to 1 (see `TilePrep`); 0: none.
        kernels: that prepare the tiles.

    Raises:
        ConfigError: unknown name (with near matches); weights that are not there, are named twice, cannot be read or
            do not fit; a network that cannot take such tiles or does not give one vector for each, or has no residual
            blocks to leave out or no layers to adapt.
    """

    def __init__(
        self,
        name: str,
        *,
        tile_px: int,
        pretrained: bool = False,
        weights: Path | None = None,
        drop_path: float = 0.0,
        lora_rank: int = 0,
        augment_symmetry: bool = False,
        stain_jitter: float = 0.0,
        kernels: KernelName = "torch",
    ) -> None:
        super().__init__()
        known = find_foundation_model(name)
        self.name = known[0] if known else name
        backbone = _create(name, tile_px, pretrained=pretrained, weights=weights, drop_path=drop_path)
        self.backbone: nn.Module = backbone
        turn_off_dropout(backbone, keep_paths=drop_path > 0)
        self.prefix_tokens: int | None = backbone.num_prefix_tokens if known and known[1].concatenates else None
        self.dim: int = try_network(backbone, name, tile_px, self._pool)
        data_config = timm.data.resolve_model_data_config(self.backbone)
        self.prepare = TilePrep(
            data_config["mean"],
            data_config["std"],
            augment_symmetry=augment_symmetry,
            stain_jitter=stain_jitter,
            kernels=kernels,
        )
        if lora_rank:
            add_adapters(backbone, lora_rank, example=torch.zeros(1, 3, tile_px, tile_px))
        key_dropouts(backbone, "encoder")
        if drop_path and not any(isinstance(module, KeyedDropout) and module.whole for module in self.modules()):
            raise ConfigError(_no_drop_path(name, drop_path))
        self.train()

    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 `[n, H, W, 3]` to features `[n, D]`."""
        return self._pool(self.backbone(self.prepare(tiles)))

    def train(self, mode: bool = True) -> "Encoder":
        """Set training or evaluation mode; BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def set_checkpointing(self, on: bool) -> None:
        """Let each block forget its inner activations in the forward and compute them again in the backward, or not.

        Raises:
            ConfigError: timm cannot do that for this network.
        """
        backbone: Any = self.backbone
        try:
            if on or hasattr(backbone, "set_grad_checkpointing"):
                backbone.set_grad_checkpointing(on)
        except (AttributeError, AssertionError) as error:  # no such method, or one that asserts that it is not asked
            raise ConfigError(
                f"--memory.checkpoint-blocks: timm has no activation checkpointing for {self.name} ({error}); "
                "leave it off and take a smaller --memory.chunk, or take another --model.encoder"
            ) from None

    def _pool(self, output: Tensor) -> Tensor:
        """What the backbone returns, to features `[n, D]`."""
        if self.prefix_tokens is not None:
            return class_and_patch_tokens(output, self.prefix_tokens)
        return output

    def has_batch_norm(self) -> bool:
        """Whether some of its statistics stay as they are."""
        return any(isinstance(module, _BatchNorm) for module in self.modules())


class GivenFeatures(nn.Module):
    """In place of a frozen encoder: hands on the features `[n, D]` that it is given, as the encoder computed them.

    Args:
        name: of the encoder.
        dim: D.
    """

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.name = name
        self.dim = dim
        self.backbone = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """As they are."""
        return self.backbone(features)

    def set_checkpointing(self, on: bool) -> None:
        """Nothing is computed, so nothing is forgotten."""

    def has_batch_norm(self) -> bool:
        """None: nothing is computed."""
        return False


def _create(name: str, tile_px: int, *, pretrained: bool, weights: Path | None, drop_path: float) -> Any:
    """Build the timm model without its classifier."""
    if pretrained and weights:
        raise ConfigError(f"model.pretrained and model.weights={weights} both name weights: choose one")
    if weights and not weights.is_file():
        raise ConfigError(f"model.weights: no file {weights}")
    known = find_foundation_model(name)
    architecture = ARCHITECTURE if name == PACKAGED_ENCODER else name
    if not known:
        _require_known(architecture)
    published = pretrained and name != PACKAGED_ENCODER

    def build(*, pretrained: bool, weights: Path | None) -> Any:
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        if known:
            file = str(weights) if weights else None
            return create_foundation_model(*known, tile_px, pretrained=pretrained, weights=file, **options)
        return _create_timm(architecture, tile_px, pretrained=pretrained, weights=weights, **options)

    try:
        if weights:
            return _with_weights(name, weights, build)
        if published:  # the hub's library tries again for a minute where there is no network
            log.info("weights: looking for those of %s in this machine's cache, and on the hub", name)
        with _quiet_hub():
            backbone = build(pretrained=published, weights=None)
    except ConfigError:
        raise
    except Exception as error:  # timm, the hub's library and the network's constructor have many ways to refuse
        # timm hands options on to the network's constructor, and not every one has this.
        if isinstance(error, TypeError) and "drop_path_rate" in str(error):
            raise ConfigError(_no_drop_path(name, drop_path)) from None
        if published and _is_about_access(error):
            raise ConfigError(_no_access(name, error)) from error
        if isinstance(error, (RuntimeError, ValueError, OSError)):  # an unknown tag, weights that do not fit
            raise ConfigError(f"model.encoder {name}: {error}") from error
        config = timm.get_pretrained_cfg(architecture, allow_unregistered=True) if ":" not in architecture else None
        raise ConfigError(refusal(name, tile_px, error, config=config)) from error
    if pretrained and name == PACKAGED_ENCODER:
        classifier = ("classifier.weight", "classifier.bias")
        state = packaged_weights()
        backbone.load_state_dict({key: state[key] for key in state if key not in classifier})
    return backbone


def _with_weights(name: str, path: Path, build: Callable[..., Any]) -> Any:
    """Build a network with the weights of a file, which timm resizes and filters exactly as it does published ones."""
    with torch.device("meta"):
        expected = build(pretrained=False, weights=None).state_dict().keys()
    state = read_weight_file(path, expected)
    # timm would also take the tensors themselves, under "state_dict" of its configuration, and copy all of them.
    with substitute(timm.models._builder, "load_state_dict", lambda *_: state), _noting_missing_keys() as missing:
        try:
            backbone = build(pretrained=False, weights=path)
        except (RuntimeError, ValueError, KeyError) as error:  # of other shapes, or without what timm's filter reads
            raise ConfigError(f"model.encoder {name}: model.weights {path} does not fit: {error}") from error
    if missing:
        raise ConfigError(
            f"model.weights: {path} is not of {name}: of its {len(expected)} tensors, {len(missing)} are not in the "
            f"file, such as {missing[0]}; {own_names(state, expected)}"
        )
    return backbone


def _require_known(name: str) -> None:
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, [*timm.list_models(), *FOUNDATION_MODELS], n=5, cutoff=0.5)
        raise ConfigError(f"model.encoder: timm has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))


def timm_recipe(name: str, tile_px: int) -> tuple[str, dict[str, Any]]:
    """Architecture and options by which timm builds an encoder of this name for tiles of this side."""
    if known := find_foundation_model(name):
        return known[1].architecture, {**known[1].options, "img_size": tile_px}
    name = ARCHITECTURE if name == PACKAGED_ENCODER else name
    if ":" in name:
        return name, {}  # as its configuration on the hub says
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return name, {"img_size": tile_px} if published is not None and published.fixed_input_size else {}


def _create_timm(name: str, tile_px: int, *, pretrained: bool, weights: Path | None, **options: Any) -> Any:
    if weights:
        # Not from the hub, also where the name is of a model there.
        options |= {"pretrained_cfg_overlay": {"file": str(weights), "source": ""}}
    options |= timm_recipe(name, tile_px)[1]
    return timm.create_model(name, num_classes=0, pretrained=pretrained or bool(weights), **options)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub library's lines on each of its attempts; the last failure is told as an error."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm.models._hub", "timm.models._builder")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _is_about_access(error: BaseException) -> bool:
    """Whether weights could not be fetched: the hub's library, and that by which it asks, have errors of their own."""
    return isinstance(error, OSError) or not isinstance(
        error, (RuntimeError, ValueError, TypeError, LookupError, AssertionError)
    )


def _no_access(name: str, error: BaseException) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"--model.pretrained: cannot get the weights of {name}, which are not in this machine's cache "
        f"({type(error).__name__}: {reason}). Where there is no internet, bring their file: --model.no-pretrained "
        "--model.weights FILE; or start from random weights: --model.no-pretrained"
    )


@contextmanager
def _noting_missing_keys() -> Iterator[list[str]]:
    """Note what state dicts that are loaded meanwhile lack; timm accepts that where it leaves out a classifier.

    Only the call itself can say so: timm translates names and reshapes tensors by a filter of each architecture, which
    it does not hand out, and returns a network that may have kept any of its random weights.
    """
    missing: list[str] = []
    original = nn.Module.load_state_dict

    def load(self: nn.Module, *args: Any, **settings: Any) -> Any:
        result = original(self, *args, **settings)
        missing.extend(result.missing_keys)
        return result

    with substitute(nn.Module, "load_state_dict", load):
        yield missing


def _no_drop_path(name: str, drop_path: float) -> str:
    return (
        f"--model.drop-path is {drop_path}: timm's {name} has no stochastic depth; set it to 0, or take another encoder"
    )
