"""What is found of an encoder as it is made: tile sides, outputs, and randomness that is not a tile's own."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional

from slidescale.engine.errors import ConfigError
from slidescale.engine.memory.two_pass import Chunks, backpropagate, encode
from slidescale.engine.models.dropout import KeyedDropout
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.models.trial import try_network, turn_off_dropout

from support.networks import Unused

K = 5
# With dropout of their own: before the classifier, in tables of relative positions, or in the forward without a layer.
OWN_DROPOUT = ["ghostnet_050", "vit_relpos_small_patch16_224", "maxvit_rmlp_pico_rw_256"]


def on_meta(name: str, tile_px: int, **settings: Any) -> Encoder:
    with torch.device("meta"):
        return Encoder(name, tile_px=tile_px, **settings)


@pytest.mark.parametrize(
    ("name", "tile_px", "message"),
    [
        (
            "test_vit",
            40,
            r"test_vit does not take tiles of 40 px \(.*; .*its patches are of 16 px: set",
        ),
        ("vit_tiny_patch16_224", 250, r"last 10 pixels of a tile, so it must be a multiple, such as 240 or 256"),
        ("convnext_atto", 250, r"takes patches of 4 px: it would never see the last 2 pixels"),
        (
            "maxvit_rmlp_pico_rw_256",
            250,
            r"not take tiles of 250 px \(.*published for tiles of 256 px: set --data",
        ),
        ("inception_v3", 32, r"--model.encoder inception_v3 does not take tiles of 32 px"),
        ("twins_pcpvt_small", 100, r"--model.encoder twins_pcpvt_small does not take tiles of 100 px"),
    ],
)
def test_tiles_that_a_network_does_not_take_are_refused(name: str, tile_px: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        on_meta(name, tile_px)


@pytest.mark.parametrize(("name", "tile_px"), [("vit_tiny_patch16_224", 96), ("swin_tiny_patch4_window7_224", 96)])
def test_networks_of_fixed_size_are_built_for_the_tiles(name: str, tile_px: int) -> None:
    assert on_meta(name, tile_px).dim > 0


class Network(nn.Module):
    """Gives what a function makes of features `[n, 4]`."""

    def __init__(self, change: Any = lambda x: x) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.path = DropPath(0.5)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.conv(x).mean((2, 3)))


class Branch(Network):
    """Adds a branch that is left out at random, over six rows for each tile or over six in all."""

    def __init__(self, over_tiles: bool) -> None:
        super().__init__()
        self.over_tiles = over_tiles

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x)
        return features + self.path(features.repeat_interleave(6, 0) if self.over_tiles else torch.ones(6, 4)).mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :, None].expand(-1, -1, 7), r"2 tiles of 32 px become a tensor of shape \[2, 4, 7\]"),
        (lambda x: (x, x), "become 2 outputs"),
        (lambda x: x.sum(0, keepdim=True), r"become a tensor of shape \[1, 4\]"),
        (
            lambda x: functional.dropout(x, 0.2),
            r"draws random numbers in training \(aten::\w+\), which",
        ),
        (lambda x: x + torch.rand_like(x), r"draws random numbers in training \(aten::rand_like\)"),
    ],
)
def test_networks_that_cannot_be_used_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        try_network(Network(change), "mine", 32, lambda output: output)


def test_attention_without_dropout_draws_nothing() -> None:
    def attend(x: Tensor, p: float) -> Tensor:
        tokens = x[:, None, None].expand(-1, 1, 5, -1)
        return functional.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=p)[:, 0, 0]

    assert try_network(Network(lambda x: attend(x, 0.0)), "mine", 32, lambda output: output) == 4
    with pytest.raises(ConfigError, match="draws random numbers"):
        try_network(Network(lambda x: attend(x, 0.5)), "mine", 32, lambda output: output)


def test_what_cannot_run_without_content_runs_on_blank_tiles() -> None:
    """And leaves no trace in the generator of random numbers."""
    network = Network(lambda x: x if float(x.sum()) < 1e9 else x[:, :1])
    other = Network(lambda x: refuse(float(x.sum())))
    before = torch.random.get_rng_state()
    assert try_network(network, "mine", 32, lambda output: output) == 4
    with pytest.raises(ConfigError, match="does not take tiles of 32 px .no, not these"):
        try_network(other, "mine", 32, lambda output: output)
    assert torch.equal(before, torch.random.get_rng_state())


def refuse(_: float) -> None:
    raise RuntimeError("no, not these")


@pytest.mark.parametrize("over_tiles", [True, False])
def test_stochastic_depth_must_be_over_tiles(over_tiles: bool) -> None:
    """Also where the rows of something else are a multiple of the tiles."""
    network = Branch(over_tiles)
    if over_tiles:
        assert try_network(network, "mine", 32, lambda output: output) == 4
        return
    with pytest.raises(ConfigError, match=r"--model.drop-path: stochastic depth in path of mine is not over tiles"):
        try_network(network, "mine", 32, lambda output: output)


@pytest.mark.parametrize("name", OWN_DROPOUT)
def test_a_networks_own_dropout_is_off(name: str) -> None:
    """Features in training are those in evaluation, where no setting has dropout."""
    side = 64
    torch.manual_seed(0)
    encoder = Encoder(name, tile_px=side)
    tiles = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(encoder.train()(tiles), encoder.eval()(tiles))
    assert not any(isinstance(module, KeyedDropout) for module in encoder.modules())


def test_turning_off_leaves_stochastic_depth_if_asked() -> None:
    network = timm.create_model("vit_tiny_patch16_224", drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1)
    turn_off_dropout(network, keep_paths=True)
    assert not any(module.p for module in network.modules() if isinstance(module, nn.Dropout))
    assert sum(module.drop_prob > 0 for module in network.modules() if isinstance(module, DropPath)) == 22
    turn_off_dropout(network, keep_paths=False)
    assert not any(module.drop_prob for module in network.modules() if isinstance(module, DropPath))


def gradients(model: SlideModel, size: int, side: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Features, and the gradient of a loss of all tiles, encoded so many at a time."""
    tiles = torch.randint(0, 256, (K, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(K))
    model.zero_grad()
    chunks = Chunks(tiles, size, -(-K // size), 5, offset=0)
    encoded = encode(model, chunks)
    encoded.features.mean(0).square().sum().backward()
    backpropagate(model, chunks, encoded, lambda loss: loss.backward())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return encoded.features.detach(), found


def check_chunks(name: str, side: int, drop_path: float) -> None:
    """Chunks of two tiles give what one batch gives, in training mode."""
    torch.manual_seed(0)
    model = SlideModel(Encoder(name, tile_px=side, drop_path=drop_path), Unused()).double().train()
    features, expected = gradients(model, K, side)
    found_features, found = gradients(model, 2, side)
    torch.testing.assert_close(found_features, features, rtol=1e-8, atol=1e-8)
    scale = max(float(gradient.norm()) for gradient in expected.values())
    assert expected.keys() == found.keys() and scale > 0
    for key, gradient in expected.items():
        assert float((found[key] - gradient).norm()) <= 1e-7 * scale, key


@pytest.mark.parametrize("name", OWN_DROPOUT)
def test_chunks_change_nothing(name: str) -> None:
    """Where layers see windows or tables of positions, or dropout has no layer."""
    check_chunks(name, 64, 0.0 if name == "ghostnet_050" else 0.3)


# Of the smaller ones in each of timm's files, the first of these words in a name decides.
SMALL = (
    "test_",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxxs",
    "xxs",
    "_xs",
    "tiny",
    "mini",
    "small",
    "_s_",
    "18",
    "050",
    "_s",
    "_10",
    "b0",
    "_t0",
    "lite",
)
LARGEST = 60e6


def smallest_of(module: str) -> str:
    def rank(name: str) -> tuple[int, int]:
        return next((place for place, word in enumerate(SMALL) if word in name), len(SMALL)), len(name)

    return min(timm.list_models(module=module), key=rank)


@pytest.mark.full
@pytest.mark.parametrize("module", [module for module in timm.list_modules() if timm.list_models(module=module)])
def test_chunks_change_nothing_in_any_family(module: str) -> None:
    """Of those that fit: with stochastic depth where timm has it, at 64 px or the nearest side that it takes."""
    name = smallest_of(module)
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    published = config.input_size[-1] if config is not None else 224
    for side in (64, 96, published):
        for drop_path in (0.2, 0.0):
            try:
                encoder = on_meta(name, side, drop_path=drop_path)
            except ConfigError as error:
                if "global_pool" in str(error):
                    pytest.skip(str(error))
                continue
            if sum(parameter.numel() for parameter in encoder.parameters()) > LARGEST or side > 256:
                pytest.skip(f"{name} is too large to compute here")
            check_chunks(name, side, drop_path)
            return
    pytest.fail(f"{name} takes no tiles")
