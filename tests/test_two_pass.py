"""What both passes share, and what a rank without tiles does."""

import pytest
import torch
from torch import nn

from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.two_pass import Chunks, Encoded, backpropagate, encode
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel


class NoisyEncoder(Encoder):
    """With stochastic depth, dropout on every feature, and a record of what it gave."""

    def __init__(self) -> None:
        super().__init__("test_vit", tile_px=32, drop_path=0.3)
        self.given: list[torch.Tensor] = []
        self.batches: list[int] = []

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(tiles))
        features = nn.functional.dropout(super().forward(tiles), 0.5, self.training)
        self.given.append(features.detach())
        return features


@pytest.fixture
def model() -> SlideModel:
    torch.manual_seed(0)
    encoder = NoisyEncoder()
    aggregator = Aggregator(encoder.dim, 2, pooling="mean", hidden_dim=4, attention_dim=4, dropout=0.0)
    return SlideModel(encoder, aggregator).train()


def chunks(k: int, *, size: int = 3, count: int = 3, seed: int = 0, offset: int = 0) -> Chunks:
    tiles = torch.randint(0, 256, (k, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
    return Chunks(tiles, size, count, seed, offset)


def backward(loss: torch.Tensor) -> None:
    loss.backward()


def with_gradient(encoded: Encoded) -> Encoded:
    """As after an aggregator whose gradient is one everywhere."""
    encoded.features.grad = torch.ones_like(encoded.features)
    return encoded


@pytest.mark.parametrize("stored", [0, 1, 2])
def test_second_pass_repeats_the_first_bit_by_bit(model: SlideModel, stored: int) -> None:
    encoded = encode(model, chunks(7), stored)
    first = encoded.features.detach()
    assert 0.3 < float((first == 0).float().mean()) < 0.7, "dropout is really on"
    seen = len(model.encoder.given)
    torch.rand(5)  # someone else draws random numbers between the passes
    backpropagate(model, chunks(7), with_gradient(encoded), backward)
    again = [0, 3, 6, 7][3 - stored]
    assert torch.equal(torch.cat(model.encoder.given[seen:]), first[:again])
    assert model.encoder.batches == [3, 3, 1, *[3, 3, 1][: 3 - stored]], "what is stored is not encoded again"


def test_random_numbers_depend_on_bag_and_tile_only(model: SlideModel) -> None:
    def features(bag: Chunks) -> torch.Tensor:
        return encode(model, bag).features.detach()

    assert not torch.equal(features(chunks(7)), features(chunks(7, seed=1)))
    assert not torch.equal(features(chunks(7)), features(chunks(7, offset=7)))
    whole = chunks(7)
    second = Chunks(whole.tiles[3:6], 3, 1, seed=0, offset=3)
    assert torch.equal(features(whole)[3:6], features(second)), "whoever encodes it"
    before = torch.random.get_rng_state()
    features(chunks(7))
    assert torch.equal(before, torch.random.get_rng_state()), "and the caller's generator is left alone"


@pytest.mark.parametrize("stored", [0, 1, 2])
def test_rank_without_tiles_keeps_in_step(model: SlideModel, stored: int) -> None:
    empty = chunks(0, count=2)
    encoded = encode(model, empty, stored)
    assert encoded.features.shape == (0, model.encoder.dim)
    backpropagate(model, empty, with_gradient(encoded), backward)
    assert model.encoder.batches == [1] * (4 - stored), "as many encoder calls as the other ranks make"
    gradients = [parameter.grad for parameter in model.encoder.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients), "zeros, not none and not NaN"


def test_batch_norm_in_training_mode_is_refused(model: SlideModel) -> None:
    model.encoder.backbone.extra = nn.BatchNorm1d(4).train()
    with pytest.raises(ConfigError, match=r"'backbone.extra' is a BatchNorm in training mode.*GroupNorm or LayerNorm"):
        encode(model, chunks(3))


def test_activations_of_one_chunk_at_a_time(model: SlideModel) -> None:
    """What autograd keeps for the backward does not grow with K."""

    def kept(k: int, stored: int) -> int:
        largest = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += tensor.numel()
            return tensor

        def backward(loss: torch.Tensor) -> None:
            nonlocal now, largest
            loss.backward()
            largest, now = max(largest, now), 0

        now = 0
        bag = chunks(k, count=-(-k // 3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoded = encode(model, bag, stored)
            assert (now == 0) == (stored == 0), "pass 1 keeps what is stored, and nothing else"
            largest = now
            backpropagate(model, bag, with_gradient(encoded), backward)
        return largest

    assert kept(30, 0) == kept(3, 0) > 0
    assert kept(30, 4) == pytest.approx(4 * kept(3, 0), rel=0.01)
