"""The networks of encoders, as timm builds them: by name, without a classifier, with published weights or a file's."""

import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from slidescale.engine.errors import ConfigError, first_line
from slidescale.engine.models.custom import is_custom, make_custom
from slidescale.engine.models.foundation import FOUNDATION_MODELS, create_foundation_model, find_foundation_model
from slidescale.engine.models.packaged import ARCHITECTURE, PACKAGED_ENCODER, packaged_weights
from slidescale.engine.models.trial import refusal
from slidescale.engine.models.weight_file import own_names, read_weight_file
from slidescale.engine.process.substitute import substitute

log = logging.getLogger(__name__)


def create_backbone(name: str, tile_px: int, *, pretrained: bool, weights: Path | None, drop_path: float) -> Any:
    """Build the timm model without its classifier; see `Encoder` for the arguments.

    Raises:
        ConfigError: there is no such model, it is not made for such tiles, or its weights are not there or do not fit.
    """
    if is_custom(name):
        return _create_custom(name, pretrained=pretrained, weights=weights, drop_path=drop_path)
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
    except Exception as error:  # timm, the hub's library and the network's constructor refuse in many ways
        # timm hands options on to the network's constructor, and not every one has this.
        if isinstance(error, TypeError) and "drop_path_rate" in str(error):
            raise ConfigError(no_drop_path(name, drop_path)) from None
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


def _create_custom(name: str, *, pretrained: bool, weights: Path | None, drop_path: float) -> nn.Module:
    """Make an encoder of the user's own."""
    if pretrained:
        raise ConfigError(
            f"--model.pretrained: nothing is published for {name}; add --model.no-pretrained, and --model.weights FILE "
            "where it has weights"
        )
    if drop_path:
        raise ConfigError(f"--model.drop-path is {drop_path}: set stochastic depth in {name} itself, and this to 0")
    backbone = make_custom("--model.encoder", name)
    if weights:
        if not weights.is_file():
            raise ConfigError(f"model.weights: no file {weights}")
        try:
            backbone.load_state_dict(read_weight_file(weights, backbone.state_dict().keys()))
        except RuntimeError as error:
            raise ConfigError(f"model.encoder {name}: model.weights {weights} does not fit: {error}") from error
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
    """Silence the hub library's lines on each of its attempts; the last failure is raised as an error."""
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
    """Whether weights could not be fetched: the hub's library and its HTTP library have errors of their own."""
    return isinstance(error, OSError) or not isinstance(
        error, (RuntimeError, ValueError, TypeError, LookupError, AssertionError)
    )


def _no_access(name: str, error: BaseException) -> str:
    return (
        f"--model.pretrained: cannot get the weights of {name}, which are not in this machine's cache "
        f"({first_line(error)}). Where there is no internet, bring their file: --model.no-pretrained "
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


def no_drop_path(name: str, drop_path: float) -> str:
    """Say that a network has no stochastic depth."""
    return (
        f"--model.drop-path is {drop_path}: timm's {name} has no stochastic depth; set it to 0, or take another encoder"
    )
