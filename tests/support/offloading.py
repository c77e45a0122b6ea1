"""Steps whose activations leave memory in between."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from slidescale.engine.memory.offload import Offload
from slidescale.engine.memory.offload_host import HostOffload
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel

CHUNK = 16


Saving = Callable[[], AbstractContextManager[None]]


def device_of(store: Offload) -> torch.device:
    return torch.device("cuda" if isinstance(store, HostOffload) else "cpu")


def make_model(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, autocast: torch.dtype | None = None
) -> SlideModel:
    torch.manual_seed(0)
    encoder = Encoder(name, tile_px=32)
    aggregator = Aggregator(encoder.dim, 2, pooling="mean", hidden_dim=4, attention_dim=4, dropout=0.0)
    return SlideModel(encoder, aggregator, autocast).to(device, dtype).train()


def make_chunks(k: int, device: torch.device, count: int | None = None) -> Chunks:
    tiles = torch.randint(0, 256, (k, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
    return Chunks(tiles.to(device), CHUNK, count or -(-k // CHUNK), seed=0, offset=0)


def step(model: SlideModel, chunks: Chunks, saving: Saving) -> None:
    """Forward with every graph stored, and backward."""
    encoded = encode(model, chunks, chunks.count, saving)
    weights = torch.linspace(-1, 1, encoded.features.numel(), device=encoded.features.device)
    encoded.features.grad = weights.view_as(encoded.features).to(encoded.features.dtype)
    backpropagate(model, chunks, encoded, lambda loss: loss.backward())


def gradients(model: SlideModel) -> dict[str, Tensor]:
    """Of the encoder's parameters, taken from it."""
    found = {name: p.grad for name, p in model.encoder.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert found and any(bool(gradient.any()) for gradient in found.values()), "equality of zeros proves nothing"
    return found


def assert_same_gradients(model: SlideModel, chunks: Chunks, store: Offload) -> None:
    """Bitwise, with what is saved away and with it kept."""
    step(model, chunks, nullcontext)
    expected = gradients(model)
    before = store.bytes_out
    step(model, chunks, store.saving)
    store.clear()
    assert store.bytes_out > before, "something has really left"
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]
