"""Foundation models without their weights: sizes, features, and how files and names are taken."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from slidescale.engine.commands import cli
from slidescale.engine.config import OptimConfig
from slidescale.engine.errors import ConfigError
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.foundation import FOUNDATION_MODELS, find_foundation_model
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.strategies.optim import parameter_groups

from support.networks import NARROW, Unused

# Published on the models' cards and in their papers, in millions; D; blocks of the network.
PUBLISHED = {
    "uni": (303, 1024, 24),
    "uni2": (681, 1536, 24),
    "virchow": (631, 2560, 32),
    "virchow2": (631, 2560, 32),
    "h_optimus_0": (1134, 1536, 40),
    "h_optimus_1": (1134, 1536, 40),
    "gigapath": (1134, 1536, 40),
}


# As the cards say it, and not as this project does: timm's network and its options, mean and standard deviation of the
# channels, and the first patch token where features are the class token beside the patches' mean (None: it alone).
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIMUS_MEAN, OPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
Card = tuple[str, dict[str, Any], tuple[float, ...], tuple[float, ...], int | None]
CARDS: dict[str, Card] = {
    "uni": (
        "vit_large_patch16_224",
        {"patch_size": 16, "init_values": 1e-5, "dynamic_img_size": True},
        IMAGENET_MEAN,
        IMAGENET_STD,
        None,
    ),
    "uni2": (
        "vit_giant_patch14_224",
        {
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "mlp_layer": SwiGLUPacked,
            "act_layer": nn.SiLU,
            "reg_tokens": 8,
            "dynamic_img_size": True,
        },
        IMAGENET_MEAN,
        IMAGENET_STD,
        None,
    ),
    "virchow": (
        "vit_huge_patch14_224",
        {
            "init_values": 1e-5,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "dynamic_img_size": True,
            "mlp_layer": SwiGLUPacked,
            "act_layer": nn.SiLU,
        },
        IMAGENET_MEAN,
        IMAGENET_STD,
        1,
    ),
    "virchow2": (
        "vit_huge_patch14_224",
        {
            "init_values": 1e-5,
            "reg_tokens": 4,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "dynamic_img_size": True,
            "mlp_layer": SwiGLUPacked,
            "act_layer": nn.SiLU,
        },
        IMAGENET_MEAN,
        IMAGENET_STD,
        5,
    ),
    "h_optimus_0": ("vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5}, OPTIMUS_MEAN, OPTIMUS_STD, None),
    "h_optimus_1": ("vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5}, OPTIMUS_MEAN, OPTIMUS_STD, None),
    "gigapath": (
        "vit_giant_patch14_dinov2",
        {
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
        },
        IMAGENET_MEAN,
        IMAGENET_STD,
        None,
    ),
}


@pytest.mark.parametrize("name", FOUNDATION_MODELS)
def test_networks_are_those_that_are_published(name: str) -> None:
    """Of full size, where tensors have no content."""
    millions, dim, blocks = PUBLISHED[name]
    with torch.device("meta"):
        encoder = Encoder(name, tile_px=224)
        encoder.prepare = nn.Identity()  # autocast, which it asks for, knows no such device
        features = encoder(torch.zeros(2, 3, 224, 224))
    assert features.shape == (2, encoder.dim) == (2, dim)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == FOUNDATION_MODELS[name].parameters
    assert count // 10**6 == millions
    groups = parameter_groups(SlideModel(encoder, Unused()), OptimConfig(lr=1.0, layer_decay=0.5))
    rates = {group["lr"] for group in groups}
    # The patch embedding and each block, with the normalisation after the last, at half the rate of the next.
    assert rates == {0.5**depth for depth in range(blocks + 1)}
    encoder.set_checkpointing(True)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("UNI", "uni"),
        ("hf-hub:MahmoodLab/UNI", "uni"),
        ("hf_hub:MahmoodLab/uni", "uni"),
        ("MahmoodLab/UNI2-h", "uni2"),
        ("UNI2-h", "uni2"),
        ("Virchow2", "virchow2"),
        ("H-optimus-0", "h_optimus_0"),
        ("hf-hub:bioptimus/H-optimus-1", "h_optimus_1"),
        ("Prov-GigaPath", "gigapath"),
        ("GigaPath", "gigapath"),
    ],
)
def test_names(written: str, name: str) -> None:
    found = find_foundation_model(written)
    assert found is not None and found == (name, FOUNDATION_MODELS[name])


@pytest.mark.parametrize("name", ["vit_large_patch16_224", "hf-hub:timm/resnet50.a1_in1k", "unity", "resnet50"])
def test_other_names_are_timms(name: str) -> None:
    assert find_foundation_model(name) is None


def random_tiles(n: int, side: int) -> Tensor:
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def normalised(tiles: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """As a model card's transform does."""
    return (tiles.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def shaken(network: nn.Module) -> nn.Module:
    """Away from the start, where layer scale makes all blocks nearly nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


@pytest.mark.parametrize("name", CARDS)
def test_networks_of_full_size_are_those_of_the_cards(name: str) -> None:
    """Layer by layer, where tensors have no content."""
    architecture, options, *_ = CARDS[name]
    with torch.device("meta"):
        card = timm.create_model(architecture, img_size=224, num_classes=0, **options)
        found: Any = Encoder(name, tile_px=224).backbone
    assert str(found) == str(card)
    shapes = {key: value.shape for key, value in card.state_dict().items()}
    assert {key: value.shape for key, value in found.state_dict().items()} == shapes
    assert {block.attn.num_heads for block in found.blocks} == {block.attn.num_heads for block in card.blocks}
    assert found.global_pool == card.global_pool


@pytest.mark.parametrize("name", CARDS)
def test_a_checkpoint_gives_the_features_of_its_card(small_foundation_models: None, tmp_path: Path, name: str) -> None:
    architecture, options, mean, std, first_patch = CARDS[name]
    card = shaken(timm.create_model(architecture, img_size=224, num_classes=0, **options | NARROW))
    torch.save(card.state_dict(), tmp_path / "pytorch_model.bin")
    tiles = random_tiles(3, 224)
    with torch.no_grad():
        tokens = card.forward_features(normalised(tiles, mean, std))
        expected = tokens[:, 0]
        if first_patch is not None:
            expected = torch.cat([tokens[:, 0], tokens[:, first_patch:].mean(1)], dim=1)
        found = Encoder(name, tile_px=224, weights=tmp_path / "pytorch_model.bin").eval()(tiles)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).min() > 1e-3, "tiles differ"
    if first_patch == 5:
        with_registers = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        assert (with_registers - expected).abs().max() > 1e-2, "registers matter"


@pytest.mark.parametrize("change", ["std", "activation"])
def test_that_comparison_can_fail(
    small_foundation_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model = FOUNDATION_MODELS["uni2"]
    mean, (red, green, blue) = model.normalisation
    wrong = dataclasses.replace(model, normalisation=(mean, (red, blue, green)))
    if change == "activation":
        options = {key: value for key, value in model.options.items() if key != "act_layer"}
        wrong = dataclasses.replace(model, options=options)
    monkeypatch.setitem(FOUNDATION_MODELS, "uni2", wrong)
    with pytest.raises(AssertionError, match="not close"):
        test_a_checkpoint_gives_the_features_of_its_card(None, tmp_path, "uni2")


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_a_file_must_fit_to_the_last_value(small_foundation_models: None, tmp_path: Path, damage: str) -> None:
    state = Encoder("gigapath", tile_px=224).backbone.state_dict()
    value = state.pop("blocks.1.mlp.fc2.weight")
    if damage == "other":
        state["blocks.1.mlp.w2.weight"] = value
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"(?s)model.encoder gigapath: .*blocks.1.mlp.fc2.weight"):
        Encoder("gigapath", tile_px=224, weights=tmp_path / "weights.pth")


def test_other_tile_sizes(small_foundation_models: None, tmp_path: Path) -> None:
    """Position embeddings are interpolated as they are loaded; half a patch is refused."""
    torch.save(Encoder("virchow2", tile_px=224).backbone.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder("virchow2", tile_px=112, weights=tmp_path / "weights.pth")
    assert encoder(random_tiles(2, 112)).shape == (2, 96)
    with pytest.raises(ConfigError, match="--data.tile-px is 256, and virchow2 takes patches of 14 px"):
        Encoder("virchow2", tile_px=256)


def test_without_access_the_hub_is_explained(
    small_foundation_models: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"accept the licence at https://huggingface.co/MahmoodLab/UNI, and log in"):
        Encoder("hf-hub:MahmoodLab/UNI", tile_px=224, pretrained=True)


def test_adapters_and_stochastic_depth_go_with_them(small_foundation_models: None) -> None:
    encoder = Encoder("uni2", tile_px=28, drop_path=0.2, lora_rank=2)
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2, "A and B, of four layers, in two blocks"


def test_they_can_be_planned_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("slidescale"), "setLevel", lambda level: None)  # other tests read the log
    monkeypatch.setattr("sys.argv", ["slidescale", "plan", "--model.encoder", "uni", "--k", "2000", "--device", "H100"])
    cli.main()
    output = capsys.readouterr().out
    assert "uni, tiles of 224 px" in output
    assert "304." in output, "with the aggregator"
