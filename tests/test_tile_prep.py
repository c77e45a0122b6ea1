"""Tile preparation: three implementations of one definition, and the augmentation that they are asked for."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import skimage.color
import torch
from torch import Tensor, nn

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
from slidescale.kernels import dispatch
from slidescale.kernels.tile_prep import blocked, operator, prepare_tiles, reference
from slidescale.kernels.variant import POINTERS

pytest.importorskip("triton")
from slidescale.kernels.tile_prep import fused

# Where there is no GPU, Triton's kernels are emulated (see conftest.py), in which bf16 is wrong.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
K, SEED = 7, 5
# fp32's own rounding, of a logarithm, an exponential and nine products; half a unit in the last place of the others.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random_tiles(n: int, height: int, width: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, height, width or height, 3), dtype=torch.uint8, generator=generator)


def random_colour(n: int, strength: float = 0.3) -> Tensor:
    """Far from the identity, so that some pixels leave the range of a byte."""
    generator = torch.Generator().manual_seed(n)
    return torch.eye(3, 4) + strength * (2 * torch.rand(n, 3, 4, generator=generator) - 1)


def arguments(n: int, height: int, width: int | None, *, symmetry: bool, colour: bool) -> dict[str, Any]:
    return {
        "tiles": random_tiles(n, height, width).to(DEVICE),
        "mean": torch.tensor(MEAN, device=DEVICE),
        "std": torch.tensor(STD, device=DEVICE),
        "symmetry": torch.arange(n, device=DEVICE) % 8 if symmetry else None,
        "colour": random_colour(n).to(DEVICE) if colour else None,
    }


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh results are full of NaN, so that a pixel nobody writes is seen."""
    allocate = operator.allocate_pixels
    monkeypatch.setattr(operator, "allocate_pixels", lambda tiles, dtype: allocate(tiles, dtype).fill_(math.nan))


def check_close(image: Tensor, expected: Tensor) -> None:
    assert image.dtype == expected.dtype
    limit = TOLERANCE[image.dtype]
    torch.testing.assert_close(image, expected, rtol=limit, atol=limit)


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


# Its implementations


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize(
    ("n", "height", "width", "symmetry"),
    [
        (0, 5, None, True),
        (1, 1, None, True),
        (1, 5, None, False),
        (7, 5, None, True),
        (8, 32, None, True),
        (3, 33, None, True),
        (8, 33, None, True),
        (1, 100, None, False),
        (7, 100, None, True),
        (3, 33, 100, False),
        (7, 31, 1, False),
        (1, 1, 32, False),
        (3, 32, 5, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_reference(
    kernels: Any, dtype: torch.dtype, n: int, height: int, width: int | None, symmetry: bool, colour: bool
) -> None:
    given = arguments(n, height, width, symmetry=symmetry, colour=colour)
    image = prepare_tiles(**given, dtype=dtype, kernels=kernels)
    assert image.shape == (n, 3, height, width or height)
    assert image.is_contiguous(memory_format=torch.channels_last)
    check_close(image, reference.prepare_tiles(**given, dtype=dtype))
    if symmetry and n:
        short = given | {"symmetry": given["symmetry"].to(torch.uint8)}
        assert torch.equal(image, prepare_tiles(**short, dtype=dtype, kernels=kernels))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("symmetry", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_blocked_equals_reference_in_other_dtypes(dtype: torch.dtype, symmetry: bool, colour: bool) -> None:
    """Each rounded once: bf16 is what fp32 rounds to."""
    given = arguments(7, 33, None, symmetry=symmetry, colour=colour)
    image = prepare_tiles(**given, dtype=dtype)
    check_close(image, reference.prepare_tiles(**given, dtype=dtype))
    if dtype == torch.bfloat16:
        assert torch.equal(image, prepare_tiles(**given, dtype=torch.float32).to(dtype))


@pytest.mark.usefixtures("poisoned")
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(7, 32, None, symmetry=True, colour=True)
    one_block = prepare_tiles(**given, dtype=torch.float32)
    monkeypatch.setattr(blocked, "CPU_VALUES", 3 * 32 * 32 * 2)
    monkeypatch.setattr(blocked, "GPU_VALUES", 3 * 32 * 32 * 2)
    assert torch.equal(one_block, prepare_tiles(**given, dtype=torch.float32))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_tiles_may_be_a_view(kernels: Any) -> None:
    given = arguments(7, 32, None, symmetry=True, colour=True)
    strided = given | {"tiles": given["tiles"].repeat_interleave(2, dim=2)[:, :, ::2]}
    assert not strided["tiles"].is_contiguous()
    image = prepare_tiles(**given, dtype=torch.float32, kernels=kernels)
    assert torch.equal(prepare_tiles(**strided, dtype=torch.float32, kernels=kernels), image)


def mutated(tmp_path: Path, old: str, new: str) -> ModuleType:
    """`fused.py` with a bug planted in it."""
    source = Path(fused.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    path = tmp_path / "mutated.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(rows < height)[:, None]", "(rows < height - 1)[:, None]"),
        ("(values < row_values)[None, :]", "(values < row_values - 1)[None, :]"),
        ("row_step = tl.where(is_swapped, 3, row_values)", "row_step = row_values"),
        (
            "is_upside_down, is_mirrored = (number & 4) != 0, (number & 2) != 0, (number & 1) != 0",
            "is_upside_down, is_mirrored = (number & 4) != 0, (number & 1) != 0, (number & 2) != 0",
        ),
        ("tl.maximum(density, 0.0)", "density"),
        ("colour + tile * 12", "colour"),
        ("inside, 1).to(tl.float32), 1.0)", "inside, 1).to(tl.float32), 2.0)"),
    ],
)
def test_planted_bugs_are_caught(tmp_path: Path, old: str, new: str) -> None:
    given = arguments(8, 33, None, symmetry=True, colour=True)
    expected = reference.prepare_tiles(**given, dtype=torch.float32)

    def image(module: ModuleType) -> Tensor:
        out = operator.allocate_pixels(given["tiles"], torch.float32).fill_(math.nan)
        module.write_prepared(out, **given)
        return out.permute(0, 3, 1, 2)

    check_close(image(fused), expected)
    with pytest.raises(AssertionError, match="not close"):
        check_close(image(mutated(tmp_path, old, new)), expected)


def spy(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Any]:
    """Calls of an implementation."""
    calls: list[Any] = []
    original: Callable[..., None] = module.write_prepared

    def write(*given: Any) -> None:
        calls.append(given)
        original(*given)

    monkeypatch.setattr(module, "write_prepared", write)
    return calls


def test_the_kernels_asked_for_run(monkeypatch: pytest.MonkeyPatch) -> None:
    in_triton, in_torch = spy(monkeypatch, fused), spy(monkeypatch, blocked)
    given = arguments(1, 5, None, symmetry=False, colour=False)
    prepare_tiles(**given, dtype=torch.float32, kernels="triton")
    assert (len(in_triton), len(in_torch)) == (1, 0)
    prepare_tiles(**given, dtype=torch.float32)
    assert (len(in_triton), len(in_torch)) == (1, 1)
    encoder = Encoder("test_resnet", tile_px=32, kernels="triton").to(DEVICE)
    encoder(random_tiles(2, 32).to(DEVICE))
    assert (len(in_triton), len(in_torch)) == (2, 1)


def test_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "tiles": random_tiles(1, 5),
        "mean": torch.tensor(MEAN),
        "std": torch.tensor(STD),
    }
    monkeypatch.setattr(dispatch, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="on a cpu device: they need an NVIDIA or AMD GPU"):
        prepare_tiles(**given, dtype=torch.float32, kernels="triton")
    with pytest.raises(ValueError, match="float64: with triton kernels it must be one of .*float32$"):
        prepare_tiles(**given, dtype=torch.float64, kernels="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiles": torch.zeros(2, 4, 5, 3)}, r"tiles are torch.float32 \[2, 4, 5, 3\]"),
        ({"tiles": torch.zeros(2, 4, 5, 4, dtype=torch.uint8)}, r"uint8 \[2, 4, 5, 4\]: they must be uint8 \[n, H, W"),
        ({"mean": torch.zeros(1)}, r"shapes \[1\] and \[3\]"),
        ({"symmetry": torch.zeros(2, dtype=torch.int64)}, "4 × 5 pixels: only square ones"),
        ({"symmetry": torch.zeros(1, dtype=torch.int64)}, r"int64 \[1\]: it must be uint8 or int64 \[2\]"),
        ({"symmetry": torch.zeros(2)}, "symmetry is torch.float32"),
        ({"colour": torch.zeros(2, 3, 3)}, r"float32 \[2, 3, 3\]: it must be float32 \[2, 3, 4\]"),
        ({"colour": torch.zeros(2, 3, 4, dtype=torch.float64)}, "colour is torch.float64"),
        ({"dtype": torch.int64}, "dtype is torch.int64"),
        ({"kernels": "cuda"}, "kernels is 'cuda'"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"tiles": random_tiles(2, 4, 5), "mean": torch.tensor(MEAN), "std": torch.tensor(STD)}
    with pytest.raises(ValueError, match=message):
        prepare_tiles(**{"dtype": torch.float32} | given | change)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("augmented", [False, True])
def test_operator_keeps_pytorchs_rules(kernels: str, augmented: bool) -> None:
    given = arguments(3, 5, None, symmetry=augmented, colour=augmented)
    order = (given["tiles"], given["mean"], given["std"], torch.float16, given["symmetry"], given["colour"], kernels)
    torch.library.opcheck(torch.ops.slidescale.prepare_tiles.default, order)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_compiles_into_one_graph(kernels: Any) -> None:
    given = arguments(3, 5, None, symmetry=True, colour=True)

    def prepare() -> Tensor:
        return prepare_tiles(**given, dtype=torch.float32, kernels=kernels) + 1

    assert torch.equal(torch.compile(prepare, fullgraph=True, backend="aot_eager")(), prepare())


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", list(POINTERS))
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize(("symmetry", "side"), [(False, 224), (True, 224), (True, 33), (True, 1)])
def test_gpu_equals_reference(kernels: Any, dtype: torch.dtype, colour: bool, symmetry: bool, side: int) -> None:
    given = arguments(17, side, None, symmetry=symmetry, colour=colour)
    image = prepare_tiles(**given, dtype=dtype, kernels=kernels)
    check_close(image, reference.prepare_tiles(**given, dtype=dtype))


@pytest.mark.gpu
def test_gpu_addresses_beyond_32_bits() -> None:
    n = 2**31 // (224 * 224 * 3) + 2
    tiles = torch.zeros((n, 224, 224, 3), dtype=torch.uint8, device="cuda")
    tiles[-1] = random_tiles(1, 224)[0].cuda()
    mean, std = torch.tensor(MEAN, device="cuda"), torch.tensor(STD, device="cuda")
    numbers = torch.full((n,), 6, device="cuda")
    image = prepare_tiles(tiles, mean, std, dtype=torch.float16, symmetry=numbers, kernels="triton")
    check_close(image[-1:], reference.prepare_tiles(tiles[-1:], mean, std, torch.float16, numbers[-1:]))


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
        unused: Any = nn.Identity()
        return SlideModel(make_encoder(**settings), unused).double().train()

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
