"""Tile preparation: three implementations of one definition, and the augmentation that they are asked for."""

import math
from typing import Any

import numpy as np
import pytest
import skimage.color
import torch
from torch import Tensor

from slidescale.engine.config import Config, DataConfig, ModelConfig, RunConfig
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.footprint import measure
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.dropout import Draw, drawing_for
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.make import make_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.models.tile_prep import TilePrep
from slidescale.kernels.tile_prep import prepare_tiles, reference

pytest.importorskip("triton")
from support.networks import Unused
from support.tiles import DEVICE, MEAN, STD, random_colour, random_tiles

K, SEED = 7, 5


# The definition


def test_reference_normalises() -> None:
    tiles = random_tiles(2, 5, 4)
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in (MEAN, STD))
    image = reference.prepare_tiles(tiles, mean, std, torch.float64)
    assert image.shape == (2, 3, 5, 4)
    for tile, channel, row, column in np.ndindex(2, 3, 5, 4):
        expected = (int(tiles[tile, row, column, channel]) / 255 - MEAN[channel]) / STD[channel]
        assert float(image[tile, channel, row, column]) == pytest.approx(expected, rel=1e-12)


def test_symmetries_are_the_eight_of_a_square() -> None:
    tile = random_tiles(1, 5)[0]
    turned = [reference.turn(tile, number).numpy() for number in range(8)]
    quarter_turns = [np.rot90(tile.numpy(), turns) for turns in range(4)]
    group = quarter_turns + [np.fliplr(each) for each in quarter_turns]
    assert len({each.tobytes() for each in turned}) == 8
    assert {each.tobytes() for each in turned} == {each.tobytes() for each in group}
    named = {0: tile.numpy(), 1: np.fliplr(tile), 2: np.flipud(tile), 3: np.rot90(tile, 2), 4: np.swapaxes(tile, 0, 1)}
    named |= {6: np.rot90(tile), 5: np.rot90(tile, -1), 7: np.rot90(np.swapaxes(tile, 0, 1), 2)}
    for number, expected in named.items():
        assert np.array_equal(turned[number], expected), number


def test_identity_of_colour_gives_the_pixel_back() -> None:
    pixels = torch.arange(256.0).repeat(3, 1).T.reshape(1, 16, 16, 3)
    out = reference.recolour(pixels, torch.eye(3, 4)[None])
    # And 0, of infinite density, counts as 1.
    torch.testing.assert_close(out, pixels.clamp(min=1), rtol=1e-5, atol=0)


def test_recolouring_is_affine_in_optical_density() -> None:
    pixels, colour = random_tiles(3, 4).double(), random_colour(3).double()
    out = reference.recolour(pixels, colour)
    brighter = 0
    for tile, row, column, channel in np.ndindex(3, 4, 4, 3):
        density = [-math.log(max(float(value), 1) / 255) for value in pixels[tile, row, column]]
        factors = colour[tile, channel].tolist()
        mixed = sum(f * od for f, od in zip(factors[:3], density, strict=True)) + factors[3]
        brighter += mixed < 0
        assert float(out[tile, row, column, channel]) == pytest.approx(min(255 * math.exp(-mixed), 255))
    assert 0 < brighter < out.numel() / 2, "some would be brighter than white"


# The encoder's first layer


def make_encoder(name: str = "test_vit", **settings: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(name, tile_px=32, **settings)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "resnet18"])
def test_autocast_rounds_pixels_as_the_first_layer_would(name: str) -> None:
    """Features and gradients are the same bits as from pixels in fp32."""
    encoder, tiles = make_encoder(name), random_tiles(5, 32)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            pixels = encoder.prepare(tiles)
            assert pixels.dtype == torch.bfloat16
            if dtype == torch.float32:
                pixels = prepare_tiles(tiles, encoder.prepare.mean, encoder.prepare.std, dtype=dtype)
            features = encoder.backbone(pixels)
        features.float().square().sum().backward()
        results.append([features, *[parameter.grad for parameter in encoder.parameters()]])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_pixels_follow_the_models_dtype() -> None:
    prepare, tiles = TilePrep(MEAN, STD), random_tiles(2, 5)
    assert prepare(tiles).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare(tiles).dtype == torch.bfloat16
        assert prepare.double()(tiles).dtype == torch.float64, "which autocast leaves alone"


def augmented(n: int, *, first: int = 0, seed: int = SEED, chunk: int | None = None, **settings: Any) -> Tensor:
    """Pixels that equal tiles become."""
    prepare = TilePrep(MEAN, STD, **settings).train()
    tiles = random_tiles(1, 8).expand(n, 8, 8, 3)
    parts = []
    for begin in range(0, n, chunk or n):
        part = tiles[begin : begin + (chunk or n)]
        with drawing_for(Draw(seed, first + begin, len(part))):
            parts.append(prepare(part))
    return torch.cat(parts)


SETTINGS: list[dict[str, Any]] = [
    {"augment_symmetry": True},
    {"stain_jitter": 0.1},
    {"augment_symmetry": True, "stain_jitter": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_augmentation_belongs_to_the_tile(settings: dict[str, Any], kernels: str) -> None:
    if kernels == "triton" and DEVICE == "cuda":
        pytest.skip("on a GPU Triton does not emulate, and these tiles are on the CPU")
    settings = settings | {"kernels": kernels}
    whole = augmented(K, **settings)
    for chunk in (1, 3):
        assert torch.equal(augmented(K, chunk=chunk, **settings), whole), "not to how a bag is cut"
    assert torch.equal(augmented(3, first=4, **settings), whole[4:]), "nor to who encodes it"
    assert len(whole.unique(dim=0)) > 3, "tiles differ"
    assert not torch.equal(augmented(K, seed=SEED + 1, **settings), whole), "and bags"


def test_augmentation_is_for_training_and_for_who_asks() -> None:
    tiles = random_tiles(K, 8)
    plain = TilePrep(MEAN, STD).train()(tiles)
    assert torch.equal(TilePrep(MEAN, STD, augment_symmetry=True, stain_jitter=0.5).eval()(tiles), plain)
    with pytest.raises(AssertionError, match="must know its tiles"):
        TilePrep(MEAN, STD, augment_symmetry=True).train()(tiles)
    with pytest.raises(AssertionError, match="7 tiles, and numbers are drawn for 6"), drawing_for(Draw(SEED, 0, 6)):
        TilePrep(MEAN, STD, stain_jitter=0.1).train()(tiles)


def test_symmetries_are_equally_likely() -> None:
    prepare = TilePrep(MEAN, STD, augment_symmetry=True)
    with drawing_for(Draw(SEED, 0, 8000)):
        counts = torch.bincount(prepare._draw_symmetry(torch.empty(8000, 0)).long())
    assert len(counts) == 8
    assert float(((counts - 1000).double().square() / 1000).sum()) < 24, "χ² of 7 degrees: one seed in a thousand fails"


def test_stain_jitter_is_that_of_tellez(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against scikit-image's own way to stains and back, whose unit of density is ln(10⁶) times larger."""
    strength, n = 0.2, 50
    uniform = torch.rand(n, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Draw, "uniform", lambda *_: uniform)
    prepare = TilePrep(MEAN, STD, stain_jitter=strength)
    tiles = random_tiles(n, 16)
    with drawing_for(Draw(SEED, 0, n)):
        colour = prepare._draw_colour(tiles)
    out = reference.recolour(tiles.double(), colour.double()).numpy() / 255
    pixels = tiles.numpy().clip(1) / 255
    amounts = skimage.color.separate_stains(pixels, skimage.color.hed_from_rgb)
    alpha = 1 - strength + 2 * strength * uniform[:, None, None, :3].double().numpy()
    beta = -strength + 2 * strength * uniform[:, None, None, 3:].double().numpy()
    jittered = alpha * amounts + beta / math.log(1e6)
    expected = skimage.color.combine_stains(jittered, skimage.color.rgb_from_hed)
    # scikit-image has no negative amounts, which most random colours need.
    possible = (amounts > 0).all(axis=-1)
    assert possible.sum() > 100
    assert np.abs(expected - pixels)[possible].mean() > 0.01, "colours change"
    np.testing.assert_allclose(out[possible], expected[possible], atol=1e-5)


@pytest.mark.parametrize("strength", [0.05, 0.2])
def test_white_stays_bright(strength: float) -> None:
    prepare = TilePrep((0.0,) * 3, (1.0,) * 3, stain_jitter=strength).train()
    with drawing_for(Draw(SEED, 0, 1000)):
        light = prepare(torch.full((1000, 1, 1, 3), 255, dtype=torch.uint8))
    lowest = math.exp(-strength * float(skimage.color.rgb_from_hed.sum(axis=0).max()))
    assert lowest <= float(light.min()) < 1
    assert float(light.max()) == 1


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_two_passes_equal_plain_autograd(settings: dict[str, Any], chunk: int) -> None:
    def model(**settings: Any) -> SlideModel:
        return SlideModel(make_encoder(**settings), Unused()).double().train()

    def gradients(model: SlideModel) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    def loss_of(features: Tensor) -> Tensor:
        return features.mean(0).square().sum()

    def plain(model: SlideModel) -> dict[str, Tensor]:
        with drawing_for(Draw(SEED, 0, K)):
            loss_of(model.encode(tiles)).backward()
        return gradients(model)

    tiles = random_tiles(K, 32)
    expected, without = plain(model(**settings)), plain(model())
    first = "encoder.backbone.patch_embed.proj.weight"
    assert float((expected[first] - without[first]).norm() / without[first].norm()) > 1e-3, "augmentation is really on"
    two_pass = model(**settings)
    chunks = Chunks(tiles, chunk, -(-K // chunk) + 1, SEED, offset=0)  # and one that only pads
    encoded = encode(two_pass, chunks)
    assert torch.equal(encoded.features, encode(two_pass, chunks).features), "encoded twice, the same bits"
    loss_of(encoded.features).backward()
    backpropagate(two_pass, chunks, encoded, lambda loss: loss.backward())
    torch.testing.assert_close(gradients(two_pass), expected, rtol=1e-9, atol=1e-13)


def test_settings_reach_the_encoder() -> None:
    config = Config(
        run=RunConfig(name="test"),
        data=DataConfig(tile_px=32, augment_symmetry=True, stain_jitter=0.05),
        model=ModelConfig(encoder="test_resnet"),
    )
    prepare = make_model(config, classes=2, bf16=False, kernels="triton").encoder.prepare
    assert (prepare.augment_symmetry, prepare.stain_jitter, prepare.kernels) == (True, 0.05, "triton")
    with pytest.raises(ConfigError, match="--data.stain-jitter is 1.0: must be a share from 0, below 1"):
        DataConfig(stain_jitter=1.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_footprint_is_measured_with_augmentation(device: str, kernels: Any) -> None:
    encoder = make_encoder("test_resnet", augment_symmetry=True, stain_jitter=0.05, kernels=kernels)
    aggregator = Aggregator(encoder.dim, 2, pooling="max", hidden_dim=4, attention_dim=4, dropout=0.0)
    model = SlideModel(encoder, aggregator, autocast=torch.bfloat16)
    tile = torch.zeros(32, 32, 3, dtype=torch.uint8)
    footprint = measure(model, tile, chunks=[1, 4], bags=[1, 4], device=device)
    assert footprint.forward(4) > 4 * 32 * 32 * 3 * 2, "the pixels in bf16, and more"
