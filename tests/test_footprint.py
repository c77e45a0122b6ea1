"""The footprint of a model is what autograd and the engine's step really hold."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slidescale.engine.errors import ConfigError
from slidescale.engine.memory import needs
from slidescale.engine.memory.fake_model import meta_copy
from slidescale.engine.memory.footprint import measure
from slidescale.engine.memory.live_bytes import LiveBytes
from slidescale.engine.memory.needs import Job
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.tile_parallel import TileGroup

from support.footprints import blank, footprint, make
from support.worlds import World

MIB = 1024**2


def saved_bytes(model: SlideModel, tiles: torch.Tensor) -> int:
    """Bytes of all storages that autograd saves, less parameters, buffers, pixels and the features."""
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model.encode(tiles)
    ours = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), tiles, features)}
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in ours)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "tile_px"), [("test_resnet", 64), ("test_vit", 160), ("test_convnext", 64), ("resnet18", 96)]
)
def test_graph_is_what_autograd_saves(name: str, tile_px: int, bf16: bool) -> None:
    n = 3
    predicted = footprint(name, tile_px, bf16=bf16, chunk=n, bag=1).graph(n)
    tiles = torch.randint(0, 256, (n, tile_px, tile_px, 3), dtype=torch.uint8)
    saved = saved_bytes(make(name, tile_px, bf16=bf16), tiles)
    assert saved > 100_000, "there is something to predict"
    # Scalars and storages of a few bytes, such as random states, are all that may differ.
    assert predicted == pytest.approx(saved, rel=0.01)


def test_checkpointed_blocks_keep_little() -> None:
    plain, checkpointed = (
        measure(make("test_vit", 160, bf16=False, checkpoint_blocks=on), blank(160), chunks=(1, 4), bags=(1,))
        for on in (False, True)
    )
    assert checkpointed.graph(4) < 0.5 * plain.graph(4)
    assert checkpointed.forward(4) == plain.forward(4), "without a graph there is nothing to forget"


def test_attention_and_normalisation_keep_more_on_a_gpu() -> None:
    """CUDA's autocast keeps normalisation in fp32; where there is no GPU its operators are measured all the same."""
    cpu, cuda = (
        measure(make("test_vit", 160, bf16=True), blank(160), chunks=(1, 4), bags=(1,), device=device)
        for device in ("cpu", "cuda")
    )
    assert 1.1 < cuda.graph(4) / cpu.graph(4) < 3
    assert cuda.backward(4) >= cuda.graph(4)


@pytest.mark.parametrize(
    ("k", "chunk", "stored"), [(8, 4, 0), (8, 4, 2), (11, 4, 3), (11, 4, 1), (5, 8, 1), (16, 4, 2)]
)
def test_phases_of_a_step_add_up(k: int, chunk: int, stored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's arithmetic against the engine's own step, storage by storage."""
    name, tile_px = "test_resnet", 96
    measured = footprint(name, tile_px, bf16=False, chunk=chunk, bag=k)
    monkeypatch.setattr(needs, "SCRATCH_SHARE", {"cpu": 0.0})  # what storages do not show
    monkeypatch.setattr(needs, "SCRATCH_BYTES", {"cpu": 0})
    monkeypatch.setattr(needs, "POOLING_BYTES", {"cpu": 0})
    need = Job(footprint=measured, prefetch=0).need(k, chunk, stored)
    model = make(name, tile_px, bf16=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tiles = torch.randint(0, 256, (k, tile_px, tile_px, 3), dtype=torch.uint8)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients, tiles]) as live:
        encoded = encode(model, Chunks(tiles, chunk, -(-k // chunk), seed=0, offset=0), stored)
        with drawing_for(Draw(0, 0, k)):
            logits, _ = model.aggregate(encoded.features, torch.zeros(k, 2), TileGroup())
        logits.sum().backward()
        backpropagate(model, Chunks(tiles, chunk, -(-k // chunk), 0, 0), encoded, lambda loss: loss.backward())
    print(f"k {k} chunk {chunk} stored {stored}: predicted / measured {(need.total - need.pixels) / live.peak:.3f}")
    assert live.peak > 8 * MIB
    assert need.total - need.pixels == pytest.approx(live.peak, rel=0.1)


def test_frozen_weights_cost_half_a_backward() -> None:
    """Of a matrix product, the backward computes the inputs' gradient, and the weights' where they train."""

    def frozen() -> SlideModel:
        model = make("test_vit", 160, bf16=False)
        for parameter in model.encoder.parameters():
            parameter.requires_grad = parameter.dim() == 1
        return model

    whole, part = (
        measure(model, blank(160), chunks=(1, 2), bags=(1, 2))
        for model in (make("test_vit", 160, bf16=False), frozen())
    )
    assert whole.flops == part.flops > 1e6
    assert 1.8 < whole.backward_flops / whole.flops < 2.3
    assert 0.8 < part.backward_flops / part.flops < 1.4


class OwnEncoder(nn.Module):
    """A module without the attributes of the engine's encoders; tiles are float `[n, 3, 16, 16]`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)])

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        x = tiles
        for block in self.blocks:
            x = block(x).relu()
        return x.mean(dim=(2, 3))


class AllPairs(nn.Module):
    """An aggregator that looks at all K features, and at each pair of this rank's and all."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, 2)

    def forward(self, features: torch.Tensor, places: torch.Tensor, group: TileGroup) -> tuple[torch.Tensor, None]:
        everyones = group.all_rows(features, len(places))
        return self.classifier((everyones @ everyones.T).softmax(dim=1).mean(dim=0) @ everyones), None


def own_model() -> SlideModel:
    return SlideModel(OwnEncoder(), AllPairs(8))  # type: ignore[arg-type]


def test_any_module_is_measured_and_left_as_it_is() -> None:
    model = own_model()
    model.encoder.register_buffer("scale", torch.ones(3))
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    found = measure(model, torch.zeros(3, 16, 16), chunks=(1, 4), bags=(1, 8))
    assert (found.dim, found.tile_bytes, found.given) == (8, 4 * 3 * 16 * 16, False)
    # In fp32, what convolutions save: their inputs, but for the pixels; and ReLUs their outputs.
    assert found.graph(4) == 4 * 4 * (4 * 14 * 14 + 8 * 12 * 12)
    assert found.block == 8 * 4 * 9 + 8 and found.parameters == found.trained == found.outside + 4 * 28 + found.block
    after = dict(model.state_dict(keep_vars=True).items())
    assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())
    assert all(parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_meta_copy_stands_for_the_model() -> None:
    model = own_model().eval()
    copied = meta_copy(model)
    assert all(tensor.is_meta for tensor in copied.state_dict().values())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert not copied.training
    sizes = {"chunks": (1, 4), "bags": (1, 8)}
    tile = torch.empty(3, 16, 16, device="meta")
    assert measure(copied, tile, **sizes) == measure(model, tile, **sizes)  # type: ignore[arg-type]


def test_a_model_that_looks_at_values_is_refused() -> None:
    class Branching(OwnEncoder):
        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            return super().forward(tiles if tiles.sum() > 0 else -tiles)

    model = SlideModel(Branching(), AllPairs(8))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="depends on the values of a tensor"):
        measure(model, torch.zeros(3, 16, 16), chunks=(1, 2), bags=(1, 2))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = own_model()
    model.encoder.lock = threading.Lock()
    with pytest.raises(ConfigError, match="cannot be copied.*TypeError"):
        measure(model, torch.zeros(3, 16, 16), chunks=(1, 2), bags=(1, 2))


def peak_on_last_rank(group: TileGroup, layers: int, k: int) -> int:
    """Peak of aggregating K tiles over the ranks and going back, less the features."""
    model = transformer(layers)
    own = group.share(k)
    features = torch.randn(own.stop - own.start, 16, requires_grad=True)
    with LiveBytes([*model.parameters(), *model.buffers(), features]) as live:
        with drawing_for(Draw(0, own.start, len(features))):
            logits, _ = model.aggregate(features, torch.zeros(k, 2), group)
        logits.sum().backward()
    return live.peak


def transformer(layers: int) -> SlideModel:
    torch.manual_seed(0)
    aggregator: Any = Aggregator(
        16,
        2,
        pooling="gated_attention",
        hidden_dim=16,
        attention_dim=8,
        dropout=0.25,
        transformer_layers=layers,
        transformer_heads=2,
    )
    if not layers:
        aggregator = AllPairs(16)
    return SlideModel(nn.Linear(3, 16), aggregator).train()  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [0, 2], ids=["all pairs", "transformer"])
def test_an_aggregator_is_measured_as_one_of_several_ranks(world: Callable[..., World], layers: int) -> None:
    k = 301
    found = measure(transformer(layers), torch.zeros(3), chunks=(1, 2), bags=(1, k), ranks=2)
    peaks = world(2).run(peak_on_last_rank, layers, k)
    assert found.aggregator(k) == pytest.approx(peaks[1], rel=0.02)
    alone = measure(transformer(layers), torch.zeros(3), chunks=(1, 2), bags=(1, -(-k // 2)))
    assert found.aggregator(k) > 1.1 * alone.aggregator(-(-k // 2)), "the other rank's tiles cost something"
