"""Random numbers that belong to tiles, and dropout that draws them."""

import contextlib

import numpy as np
import pytest
import scipy.stats
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from slidescale.engine.models.dropout import Draw, KeyedDropout, drawing_for, key_dropouts
from slidescale.engine.seeding import derive_seed
from slidescale.kernels.keyed_random import keyed_uniform

SEED = derive_seed("test")


def draw(n: int, size: int, seed: int = SEED) -> Tensor:
    return keyed_uniform(seed, torch.arange(n), size)


def correlation(x: Tensor, y: Tensor) -> float:
    """In standard deviations of what independent numbers give."""
    return float(np.corrcoef(x.flatten(), y.flatten())[0, 1]) * x.numel() ** 0.5


@pytest.mark.parametrize(("n", "size"), [(1, 100_003), (100_003, 1), (317, 331)])
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1])
def test_numbers_are_uniform(n: int, size: int, seed: int) -> None:
    """Down one tile's numbers, across tiles, and over both; also for seeds that are not hashes."""
    u = draw(n, size, seed)
    assert u.shape == (n, size)
    assert u.dtype == torch.float32
    assert ((u >= 0) & (u < 1)).all()
    # 1e-4 and not less: over these 12 cases one in a thousand seeds would fail.
    assert scipy.stats.kstest(u.flatten().double(), "uniform").pvalue > 1e-4
    assert float(u.double().mean()) == pytest.approx(1 / 2, abs=4 * (1 / 12 / u.numel()) ** 0.5)
    assert float(u.double().var()) == pytest.approx(1 / 12, abs=4 * (1 / 180 / u.numel()) ** 0.5)


def test_numbers_are_fine_grained() -> None:
    """All 24 bits that an fp32 number below 1 can use are random, down to the last."""
    bits = (draw(317, 331) * 2**24).long()
    for bit in range(24):
        share = float((bits >> bit & 1).double().mean())
        assert share == pytest.approx(1 / 2, abs=4 * 0.5 / bits.numel() ** 0.5), bit


def test_numbers_depend_on_seed_and_tile_only() -> None:
    whole = draw(50, 40)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keyed_uniform(SEED, order, 40), whole[order]), "not on their order"
    assert torch.equal(keyed_uniform(SEED, torch.tensor([7]), 40)[0], whole[7]), "nor on who else is drawn for"
    assert torch.equal(draw(50, 7), whole[:, :7]), "nor on how many are drawn"
    assert keyed_uniform(SEED, torch.arange(0), 40).shape == (0, 40)
    state = torch.random.get_rng_state()
    draw(50, 40)
    assert torch.equal(state, torch.random.get_rng_state()), "nor on torch's generator, nor the other way round"


@pytest.mark.parametrize("other", [SEED + 1, SEED - 1, derive_seed("other")])
def test_numbers_differ_between_seeds_and_tiles(other: int) -> None:
    u, v = draw(400, 250), draw(400, 250, other)
    assert float((u == v).float().mean()) < 1e-4, "equal by chance only, 2^-24 of them"
    assert abs(correlation(u, v)) < 4.5
    assert len(torch.unique(u[:, 0])) > 395, "tiles have numbers of their own"


@pytest.mark.parametrize("lag", [1, 2, 16])
def test_neighbours_are_uncorrelated(lag: int) -> None:
    u = draw(400, 250)
    assert abs(correlation(u[lag:], u[:-lag])) < 4.5, "neighbouring tiles"
    assert abs(correlation(u[:, lag:], u[:, :-lag])) < 4.5, "neighbouring numbers of a tile"
    assert abs(correlation(u[lag:, lag:], u[:-lag, :-lag])) < 4.5, "tile and place moved together"
    assert abs(correlation(u[lag:, :-lag], u[:-lag, lag:])) < 4.5, "or against each other"


def test_correlation_would_be_found() -> None:
    """The measure above catches numbers that share a tenth."""
    u, v = draw(400, 250), draw(400, 250, SEED + 1)
    assert abs(correlation(u, 0.9 * v + 0.1 * u)) > 30


def dropped(layer: nn.Module, x: Tensor, *, first: int = 0, count: int | None = None, seed: int = 1) -> Tensor:
    with drawing_for(Draw(seed, first, len(x) if count is None else count)):
        return layer(x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_expectation(p: float) -> None:
    x = torch.ones(100, 10, 50, dtype=torch.float64)
    out = dropped(KeyedDropout(p, whole=False, layer="a"), x)
    kept = out != 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=4 * deviation)
    assert torch.equal(out[kept].unique(), torch.tensor([1 / (1 - p)], dtype=torch.float64))


def test_dropout_scales_bf16_as_pytorch_does() -> None:
    """By the number itself: 4/3 rounded to bf16 would be 0.2% too much on every value."""
    x = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = dropped(KeyedDropout(0.25, whole=False, layer="a"), x)
    expected = (x.double() / 0.75).bfloat16()
    assert torch.equal(out, torch.where(out == 0, 0, expected))
    assert not torch.equal(expected, x * torch.tensor(1 / 0.75).bfloat16()), "which is not the same"


@pytest.mark.parametrize("whole", [False, True])
def test_evaluation_drops_nothing(whole: bool) -> None:
    x = torch.randn(5, 3)
    assert KeyedDropout(0.5, whole=whole, layer="a").eval()(x) is x, "and needs no tiles named"


def test_training_without_named_tiles_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="must know its tiles"):
        KeyedDropout(0.5, whole=False, layer="a")(torch.ones(2, 3))
    with pytest.raises(AssertionError, match="5 rows of 2 tiles"):
        dropped(KeyedDropout(0.5, whole=False, layer="a"), torch.ones(5, 3), count=2)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_masks_are_the_tiles_own_however_they_are_cut(whole: bool, windows: int, size: int) -> None:
    """Also where a tile's rows are several, as in attention over windows."""
    layer = KeyedDropout(0.5, whole=whole, layer="a")
    x = torch.ones(23 * windows, 5, 2)
    expected = dropped(layer, x, count=23)
    assert 0.2 < float((expected == 0).float().mean()) < 0.8, "dropout is really on"
    parts = [
        dropped(layer, x[first * windows : (first + size) * windows], first=first, count=min(size, 23 - first))
        for first in range(0, 23, size)
    ]
    assert torch.equal(torch.cat(parts), expected)


def test_masks_differ_between_bags_layers_and_tiles() -> None:
    layer, x = KeyedDropout(0.5, whole=False, layer="a"), torch.ones(4, 100)
    out = dropped(layer, x)
    assert torch.equal(out, dropped(layer, x)), "and nothing else"
    assert not torch.equal(out, dropped(layer, x, seed=2))
    assert not torch.equal(out, dropped(layer, x, first=1))
    assert not torch.equal(out, dropped(KeyedDropout(0.5, whole=False, layer="b"), x))
    assert len(out.unique(dim=0)) == 4


@pytest.mark.parametrize("windows", [1, 4])
def test_stochastic_depth_takes_whole_tiles(windows: int) -> None:
    x = torch.ones(1000 * windows, 3, 2)
    out = dropped(KeyedDropout(0.3, whole=True, layer="a"), x, count=1000)
    tiles = out.view(1000, -1)
    assert torch.equal(tiles, tiles[:, :1].expand_as(tiles)), "all of a tile or nothing, all its windows included"
    assert float((tiles[:, 0] == 0).float().mean()) == pytest.approx(0.3, abs=4 * (0.21 / 1000) ** 0.5)


@pytest.mark.parametrize("whole", [False, True])
def test_gradient_is_dropped_alike(whole: bool) -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    layer = KeyedDropout(0.5, whole=whole, layer="a")
    assert torch.autograd.gradcheck(lambda x: dropped(layer, x), x)


def test_draws_nest() -> None:
    layer, x = KeyedDropout(0.5, whole=False, layer="a"), torch.ones(4, 100)
    with drawing_for(Draw(1, 0, 4)):
        outer = layer(x)
        with contextlib.suppress(RuntimeError), drawing_for(Draw(2, 0, 4)):
            assert not torch.equal(layer(x), outer)
            raise RuntimeError
        assert torch.equal(layer(x), outer), "the outer one is back, also after an error"


def test_keying_replaces_what_drops() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.25)
            self.off = nn.Dropout(0.0)
            self.path = DropPath(0.5)
            self.no_path = DropPath(0.0)
            self.steps = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    block = Block()
    key_dropouts(block, "encoder")
    keyed = [(module.p, module.whole, module.layer) for module in block.modules() if isinstance(module, KeyedDropout)]
    assert keyed == [(0.25, False, "encoder.drop"), (0.5, True, "encoder.path"), (0.5, False, "encoder.steps.1")]
    assert isinstance(block.off, nn.Dropout) and isinstance(block.no_path, DropPath), "which drop nothing"
