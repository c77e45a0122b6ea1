"""Encoders, aggregators and the objective."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from slidescale.engine.errors import ConfigError
from slidescale.engine.models.aggregator import Aggregator, SlideNorm
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training import slides as slides_of_run
from slidescale.kernels.gated_attention import Partial, merge_partials, pool_partial


def random_tiles(n: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "resnet10t"])
def test_encoder_equals_timm(name: str) -> None:
    """Pixels reach the network as timm's own evaluation transform would bring them."""
    encoder = Encoder(name, tile_px=32).eval()
    data = timm.data.resolve_model_data_config(encoder.backbone)
    tiles = random_tiles(3)
    image = (tiles.permute(0, 3, 1, 2) / 255 - torch.tensor(data["mean"]).view(3, 1, 1)) / torch.tensor(
        data["std"]
    ).view(3, 1, 1)
    features = encoder(tiles)
    assert features.shape == (3, encoder.dim)
    torch.testing.assert_close(features, encoder.backbone(image), rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics_are_frozen_and_its_scale_trains() -> None:
    encoder = Encoder("test_resnet", tile_px=32).train()
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    assert norms
    before = [norm.running_mean.clone() for norm in norms]
    encoder(random_tiles(4)).sum().backward()
    for norm, mean in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert norm.weight.grad is not None


def test_unknown_encoder_has_near_matches() -> None:
    with pytest.raises(ConfigError, match="resnet50"):
        Encoder("resnet5O", tile_px=32)


def test_weights_from_a_file(tmp_path: Path) -> None:
    trained = timm.create_model("test_resnet", num_classes=1000)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder("test_resnet", tile_px=32, weights=tmp_path / "weights.pth")
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name
    with pytest.raises(ConfigError, match="no file"):
        Encoder("test_resnet", tile_px=32, weights=tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="choose one"):
        Encoder("test_resnet", tile_px=32, weights=tmp_path / "weights.pth", pretrained=True)


@pytest.mark.parametrize(
    ("pooling", "branches"), [("gated_attention", 1), ("gated_attention", 3), ("mean", 1), ("max", 1)]
)
@pytest.mark.parametrize("k", [1, 7])
def test_pooling_equals_its_definition(pooling: str, branches: int, k: int) -> None:
    torch.manual_seed(0)
    aggregator = Aggregator(
        12, 3, pooling=pooling, hidden_dim=10, attention_dim=6, attention_branches=branches, dropout=0.0
    ).double()
    features = torch.randn(k, 12, dtype=torch.float64)
    logits, weights = aggregator(features, torch.rand(k, 2), TileGroup())
    h = aggregator.projection(features)
    if pooling == "mean":
        expected = h.mean(0)
    elif pooling == "max":
        expected = h.amax(0)
    else:
        p = aggregator.pooling
        gate = torch.tanh(h @ p.v_weight.T + p.v_bias) * torch.sigmoid(h @ p.u_weight.T + p.u_bias)
        attention = (gate @ p.w_weight.T + p.w_bias).softmax(dim=0)
        expected = torch.cat([(attention[:, branch, None] * h).sum(0) for branch in range(branches)])
        torch.testing.assert_close(weights, attention.mean(1).detach())
    torch.testing.assert_close(logits, aggregator.classifier(expected))
    assert weights.shape == (k,)
    assert float(weights.sum()) == pytest.approx(1)
    assert not weights.requires_grad


def test_slide_norm() -> None:
    norm = SlideNorm()
    features = torch.randn(50, 4, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 5.0, 0.0]) + 7
    out = norm(features, TileGroup())
    torch.testing.assert_close(out.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
    live = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(out.std(0, unbiased=False), live, atol=1e-3, rtol=0)
    assert not norm(features[:1], TileGroup()).any(), "one tile has nothing to be compared with"


def test_partials_of_disjoint_tiles_merge() -> None:
    """With scores so far apart that a softmax without its running maximum would overflow."""
    torch.manual_seed(0)
    scores = torch.tensor([[-900.0, 3.0, 1000.0, 999.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]]).T
    features = torch.randn(5, 4)
    parts = [pool_partial(scores[rows], features[rows]) for rows in (slice(0, 2), slice(2, 2), slice(2, 5))]
    merged = merge_partials(Partial(*map(torch.stack, zip(*parts, strict=True))))
    torch.testing.assert_close(merged.acc / merged.l[:, None], scores.softmax(0).T @ features)


def test_autocast_keeps_the_sum_over_tiles_in_fp32() -> None:
    """Pooling 4,096 equal tiles gives the tile; a bf16 sum would be percents off."""
    torch.manual_seed(0)
    model = SlideModel(
        Encoder("test_resnet", tile_px=32),
        Aggregator(8, 2, pooling="gated_attention", hidden_dim=8, attention_dim=4, dropout=0.0),
        autocast=torch.bfloat16,
    )
    one = torch.randn(1, 8)
    few, _ = model.aggregate(one, torch.zeros(1, 2), TileGroup())
    many, weights = model.aggregate(one.expand(4096, 8), torch.zeros(4096, 2), TileGroup())
    assert few.dtype == torch.float32
    torch.testing.assert_close(many, few, rtol=1e-2, atol=1e-3)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-4)


def test_class_weights_weigh() -> None:
    """PyTorch's own weights cancel in the mean over a batch of one."""
    logits = torch.tensor([0.3, -0.2, 0.1])
    target = torch.tensor([2.0], dtype=torch.float64)
    plain = CrossEntropy((), 3)(logits, target)
    torch.testing.assert_close(plain, -logits.log_softmax(0)[2])
    torch.testing.assert_close(CrossEntropy((1.0, 1.0, 0.7), 3)(logits, target), 0.7 * plain)


def test_slides_that_normalisation_makes_alike_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Of one tile, or in training a bag of one."""
    slides = {"train": {"a": 9, "b": 1}, "val": {"c": 1}, "test": {"d": 4}}
    cohort: Any = SimpleNamespace(
        usable=lambda split: [SimpleNamespace(slide_id=name, split=split) for name in slides[split]],
        tilings={name: SimpleNamespace(coords=[0] * n) for split in slides.values() for name, n in split.items()},
    )
    for k, expected in (("all", "2 of 4 slides have one tile (b, c)"), (1, "3 of 4 slides have one tile (a, b, c)")):
        caplog.clear()
        slides_of_run._warn_of_single_tiles(cohort, k)
        assert expected in caplog.text and "predicted alike" in caplog.text
    slides.update({"train": {"a": 9}, "val": {}})
    caplog.clear()
    slides_of_run._warn_of_single_tiles(cohort, "all")
    assert not caplog.text
