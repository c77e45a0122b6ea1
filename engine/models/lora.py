"""Low-rank adapters in a tile encoder (LoRA: Hu et al. 2022, arXiv:2106.09685), by the peft package."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from slidescale.engine.errors import ConfigError

log = logging.getLogger(__name__)

# The adapter's output is scaled by alpha / rank. Twice the rank keeps that at 2 at any rank, so that a learning rate
# found at one rank serves at another.
ALPHA_PER_RANK = 2


def add_adapters(backbone: nn.Module, rank: int, example: Tensor) -> None:
    """Give each linear layer of a backbone an adapter, which alone is trained from then on; in place.

    A layer's y = W x + b becomes y = W x + b + 2 B A x, A `[rank, in]` random and B `[out, rank]` zero, without
    dropout: at the start the outputs are the backbone's own. An attention layer that makes queries, keys and values
    in one product has one adapter for the three. Convolutions get none: the encoders that are too large to train
    otherwise are transformers.

    Args:
        example: an input of the backbone, to see which layers it calls. Some networks use a layer's weight without
            calling the layer (timm's BEiT and SwinV2 in attention); an adapter there would have no effect.

    Raises:
        ConfigError: peft is not installed, or the backbone calls no linear layer.
    """
    peft = _import_peft()
    called = _called_linear_layers(backbone, example)
    if not called:
        raise ConfigError(
            f"--model.lora-rank: {type(backbone).__name__} has no linear layers to adapt: "
            "take a transformer as --model.encoder, or train its weights (--model.lora-rank 0)"
        )
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if uncalled := [name for name in linear if name not in called]:
        log.warning(
            "%d of the encoder's %d linear layers get no adapter, because the network uses their weights without "
            "calling them: %s",
            len(uncalled),
            len(linear),
            ", ".join(uncalled),
        )
    targets = "|".join(re.escape(name) for name in called)  # a pattern matches whole names, a list their ends as well
    settings = peft.LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=targets, lora_dropout=0.0)
    peft.inject_adapter_in_model(settings, backbone)  # nothing else trains from here on
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in backbone.named_parameters())


def merge_adapters(encoder: nn.Module) -> None:
    """Add each adapter's product 2 B A to its layer's weight and take the adapter away; in place.

    What remains is a plain timm model, whose state dict timm loads. Without adapters nothing changes.
    """
    if not any(".lora_A." in name for name, _ in encoder.named_parameters()):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in list(encoder.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            encoder.set_submodule(name, module.get_base_layer())


def _import_peft() -> ModuleType:
    try:
        import peft  # takes seconds to import
    except ImportError as error:
        raise ConfigError(
            f"--model.lora-rank needs the peft package ({error}): pip install 'slidescale[lora]'"
        ) from None
    return peft


def _called_linear_layers(backbone: nn.Module, example: Tensor) -> list[str]:
    """Names of the linear layers that a forward calls."""
    linear = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    seen: set[nn.Module] = set()
    handles = [module.register_forward_hook(lambda module, *_: seen.add(module)) for module in linear.values()]
    with _evaluating(backbone), torch.no_grad():
        backbone(example)
    for handle in handles:
        handle.remove()
    return [name for name, module in linear.items() if module in seen]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode, so that a forward leaves no trace in statistics, and training mode afterwards."""
    module.eval()
    yield
    module.train()
