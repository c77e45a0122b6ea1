"""Tile preparation: the implementations of one definition."""

import importlib.util
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from slidescale.engine.models.encoder import Encoder
from slidescale.kernels import dispatch
from slidescale.kernels.tile_prep import blocked, fused, operator, prepare_tiles, reference
from slidescale.kernels.variant import POINTERS

from support.grids import rest_in_full
from support.pairwise import pairwise
from support.tiles import DEVICE, MEAN, STD, random_colour, random_tiles

# fp32's own rounding, of a logarithm, an exponential and nine products; half a unit in the last place of the others.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


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


# (n, height, width, symmetry)
TILES = [
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
]
WAYS: dict[str, Any] = {
    "kernels": ("torch", "triton"),
    "dtype": (torch.float32, torch.float16),
    "tiles": TILES,
    "colour": (False, True),
}
FEW = [tuple(each.values()) for each in pairwise(WAYS)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kernels", "dtype", "tiles", "colour"), rest_in_full(FEW, [*product(*WAYS.values())]))
def test_equals_reference(
    kernels: Any, dtype: torch.dtype, tiles: tuple[int, int, int | None, bool], colour: bool
) -> None:
    n, height, width, symmetry = tiles
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
