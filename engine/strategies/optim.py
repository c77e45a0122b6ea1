"""Parameter groups and optimizer of the recipe, for where ds.json names none."""

import importlib.machinery
import importlib.metadata
import importlib.util
import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from slidescale.engine.config import OptimConfig
from slidescale.engine.errors import ConfigError
from slidescale.engine.models.slide_model import SlideModel

# What a run with apex needs, for the messages where it is missing.
INSTALL_APEX = (
    "install NVIDIA's from source, with its CUDA extensions: git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation . (or take --optim.optimizer adamw)"
)

# Of CLAM (Lu et al. 2021), whose settings slide-level training is usually compared with.
SGD_MOMENTUM = 0.9


def parameter_groups(model: SlideModel, config: OptimConfig) -> list[dict[str, Any]]:
    """Trained parameters in groups, each with its `name`, its peak learning rate `lr` and its `weight_decay`.

    The aggregator's come first, at `optim.lr`; the encoder's follow at `optim.encoder_lr_scale` times that. With
    `optim.layer_decay` below 1 each of the encoder's layers, as timm numbers them, has groups of its own: the last
    layer that holds a matrix, and a normalisation after it, at the encoder's rate, the layer before at `layer_decay`
    times it, and so on down to the patch embedding (Clark et al. 2020, arXiv:2003.10555; for vision transformers Bao et
    al. 2022, arXiv:2106.08254).

    Matrices decay. Vectors (biases, normalisation layers) do not, nor does what the timm model exempts, such as
    position embeddings.

    Raises:
        ConfigError: `layer_decay` is not 1, and timm does not number the encoder's layers.
    """
    backbone: Any = model.encoder.backbone
    exempt = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    groups = _by_decay("aggregator", model.aggregator.named_parameters(), config.lr, config.weight_decay, ())
    for name, lr, parameters in _encoder_layers(backbone, config):
        groups += _by_decay(name, parameters, lr, config.weight_decay, exempt)
    return groups


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """The optimizer that `optim.optimizer` names, over groups that carry their own rates and decay.

    - adamw: Loshchilov & Hutter 2019, in PyTorch's fused kernels (one pass over the parameters, on CPU and GPU).
    - sgd: with momentum 0.9; its weight decay is PyTorch's, added to the gradient.
    - apex_adam: apex's FusedAdam with decoupled decay, the same arithmetic as adamw.
    - apex_lamb: apex's FusedLAMB (You et al. 2020, arXiv:1904.00962); parameters without decay get no trust ratio.

    Raises:
        ConfigError: apex is not installed, is another package of that name or lacks its CUDA extensions, or the
            parameters are not whole and on a GPU, as its kernels want them.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=SGD_MOMENTUM)
    apex_optimizers = _import_apex_optimizers(config.optimizer)
    _require_whole_on_gpu(groups, config.optimizer)
    if config.optimizer == "apex_adam":
        return apex_optimizers.FusedAdam(groups, lr=config.lr, adam_w_mode=True)
    # The engine clips, and FusedLAMB must not: its kernel divides gradients by norm / max_grad_norm where the norm is
    # above max_grad_norm. No norm is above infinity, whereas 0 would make every gradient zero.
    return apex_optimizers.FusedLAMB(groups, lr=config.lr, adam_w_mode=True, max_grad_norm=math.inf)


def _encoder_layers(
    backbone: Any, config: OptimConfig
) -> Iterator[tuple[str, float, Iterable[tuple[str, nn.Parameter]]]]:
    """Name, learning rate and parameters of each of the encoder's layers, first to last; without decay, all as one."""
    lr = config.lr * config.encoder_lr_scale
    if config.layer_decay == 1:
        yield "encoder", lr, backbone.named_parameters()
        return
    layers = {}
    if hasattr(backbone, "group_matcher"):
        layers = group_parameters(backbone, backbone.group_matcher(coarse=False))
    if len(layers) < 2:
        raise ConfigError(
            f"--optim.layer-decay is {config.layer_decay}, and timm does not say which parameters of "
            f"{type(backbone).__name__} belong to which layer: set it to 1, or take another --model.encoder"
        )
    parameters = dict(backbone.named_parameters())
    assert sum(map(len, layers.values())) == len(parameters), "each parameter is in one layer"
    # In some networks timm numbers the normalisation after the last block (`head.norm`, `fc_norm`) as a layer of its
    # own; the block would be a step slower there than in others.
    last = max(
        (layer for layer, names in layers.items() if any(parameters[name].ndim > 1 for name in names)),
        default=max(layers),
    )
    for layer, names in sorted(layers.items()):
        rate = lr * config.layer_decay ** max(0, last - layer)
        yield f"encoder.layer{layer}", rate, [(name, parameters[name]) for name in names]


def _by_decay(
    name: str, parameters: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float, exempt: Iterable[str]
) -> list[dict[str, Any]]:
    """Two groups of what is trained, that which decays and that which does not, or those of them with members.

    Args:
        exempt: names that do not decay, with timm's wildcards.
    """
    decaying: list[nn.Parameter] = []
    constant: list[nn.Parameter] = []
    for parameter_name, parameter in parameters:
        if parameter.requires_grad:
            is_exempt = parameter.ndim <= 1 or any(fnmatch(parameter_name, pattern) for pattern in exempt)
            (constant if is_exempt else decaying).append(parameter)
    groups = (
        {"name": f"{name}.decay", "params": decaying, "lr": lr, "weight_decay": weight_decay},
        {"name": f"{name}.no_decay", "params": constant, "lr": lr, "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def _import_apex_optimizers(wanted: str) -> Any:
    """NVIDIA's `apex.optimizers`, able to run."""
    setting = f"--optim.optimizer {wanted}"
    found = importlib.util.find_spec("apex")
    if found is None:
        raise ConfigError(f"{setting}: apex is not installed; {INSTALL_APEX}")
    # Looked for, not imported: the package that is called apex on PyPI would import a web framework and fail anyhow.
    folders = list(found.submodule_search_locations or [])
    if importlib.machinery.PathFinder.find_spec("apex.optimizers", folders) is None:
        try:
            about = importlib.metadata.metadata("apex")
            what = f"the installed package apex {about['Version']} ({about['Summary']})"
            remedy = "which `pip install apex` gets; remove it with `pip uninstall apex`, and"
        except importlib.metadata.PackageNotFoundError:  # a folder of that name, such as an uninstalled clone
            what, remedy = f"what Python finds as apex, in {', '.join(folders) or found.origin},", "which hides it;"
        raise ConfigError(f"{setting}: {what} is not NVIDIA's apex but another, {remedy} {INSTALL_APEX}")
    try:
        importlib.import_module("amp_C")
        return importlib.import_module("apex.optimizers")
    except ImportError as error:
        raise ConfigError(
            f"{setting}: NVIDIA's apex is installed without CUDA extensions that load here ({error}); {INSTALL_APEX}"
        ) from None


def _require_whole_on_gpu(groups: list[dict[str, Any]], wanted: str) -> None:
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ConfigError(f"--optim.optimizer {wanted}: apex cannot step parameters that fsdp has split; take adamw")
    if elsewhere := {parameter.device.type for parameter in parameters} - {"cuda"}:
        raise ConfigError(
            f"--optim.optimizer {wanted}: apex runs on GPUs only, and parameters are on {' and '.join(elsewhere)}; "
            "take adamw, whose fused kernels run on both"
        )
