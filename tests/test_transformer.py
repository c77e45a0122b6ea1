"""Transformer layers: over ranks, beside plain PyTorch, and in memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from slidescale.engine.models import transformer
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.dropout import Draw, KeyedDropout, drawing_for, key_dropouts
from slidescale.engine.models.transformer import attend, encode_position
from slidescale.engine.parallel import collectives
from slidescale.engine.parallel.tile_parallel import TileGroup

DIM, WIDTH, HEADS, CLASSES = 6, 16, 2, 3
BAG_SIZES = (1, 2, 7, 33)  # with 3 ranks: ranks without a tile, uneven shares
TOLERANCE = 1e-12  # fp64 adds in another order on other ranks, nothing else

# Logits, weights, gradient of features, and gradient of every parameter by name.
Outcome = dict[str, Tensor]


def make_aggregator(**settings: Any) -> Aggregator:
    """In fp64, with no parameter at a value (0, 1) that could hide a mistake."""
    torch.manual_seed(0)
    usual = {"pooling": "gated_attention", "dropout": 0.0, "transformer_layers": 2}
    aggregator = Aggregator(
        DIM,
        CLASSES,
        hidden_dim=WIDTH,
        attention_dim=5,
        transformer_heads=HEADS,
        **(usual | settings),
    ).double()
    key_dropouts(aggregator, "aggregator")  # as a slide model does
    with torch.no_grad():
        for parameter in aggregator.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return aggregator


def make_bag(k: int) -> tuple[Tensor, Tensor]:
    """Features `[K, DIM]` and coordinates `[K, 2]`, some between grid points, and far from the origin."""
    generator = torch.Generator().manual_seed(k)
    features = torch.randn(k, DIM, dtype=torch.float64, generator=generator)
    return features, 50 + 20 * torch.rand(k, 2, dtype=torch.float64, generator=generator)


def run(group: TileGroup, k: int, bug: bool = False, settings: dict[str, Any] | None = None) -> Outcome:
    """One rank's forward and backward of the plain loss; parameters' gradients are the mean over ranks."""
    aggregator = make_aggregator(**(settings or {}))
    features, coords = make_bag(k)
    own = group.share(k)
    features = features[own].clone().requires_grad_()
    draw = Draw(seed=5, first=own.start, count=own.stop - own.start)
    with gather_forgets_the_other_ranks() if bug else nullcontext(), drawing_for(draw):
        logits, weights = aggregator(features, coords, group)
        nn.functional.cross_entropy(logits[None], torch.tensor([1])).backward()
    outcome = {"logits": logits.detach(), "weights": weights, "features": features.grad / group.size}
    for name, parameter in aggregator.named_parameters():
        assert parameter.grad is not None, f"{name} gets a gradient on every rank"
        outcome[name] = group.sum(parameter.grad) / group.size
    return outcome


@contextmanager
def gather_forgets_the_other_ranks() -> Iterator[None]:
    """The planted bug: the backward of the gather returns the rank's own slice and sums nothing."""
    kind = collectives._AllGatherRows
    original = kind.backward

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rank = torch.distributed.get_rank(ctx.group)
        # times T: right for what ranks use alike, as the gathered copies of a loss would be
        return len(ctx.counts) * grad.split(ctx.counts)[rank], None, None

    kind.backward = staticmethod(backward)
    try:
        yield
    finally:
        kind.backward = original


def assemble(ranks: list[Outcome]) -> Outcome:
    """The bag's outcome from the ranks'; what every rank has is asserted equal."""
    whole = dict(ranks[0])
    for name in whole:
        if name in ("weights", "features"):
            whole[name] = torch.cat([rank[name] for rank in ranks])
        else:
            assert all(torch.equal(rank[name], whole[name]) for rank in ranks), name
    return whole


def worst_difference(a: Outcome, b: Outcome) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_equal_one_process(world: Any, ranks: int) -> None:
    for k in BAG_SIZES:
        expected = run(TileGroup(), k)
        moved = [name for name, value in expected.items() if value.abs().max() > 1e-6]
        # A key's bias moves all scores of a query alike, and K = 1 has nothing to weigh, but the rest must move.
        assert len(moved) > 10 and {"logits", "features", "transformer.layers.0.mlp.0.weight"} <= set(moved)
        got = [run(TileGroup(), k)] if ranks == 1 else world(ranks).run(run, k)
        assert worst_difference(assemble(got), expected) <= TOLERANCE, f"K = {k}"


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_between_slide_norm_and_other_poolings(world: Any, pooling: str) -> None:
    """The gathers keep in step with the collectives before and after them, on a rank without tiles too."""
    settings = {"slide_norm": True, "pooling": pooling}
    for k in (2, 7):
        expected = run(TileGroup(), k, settings=settings)
        assert worst_difference(assemble(world(3).run(run, k, False, settings)), expected) <= TOLERANCE


def test_a_gather_that_does_not_sum_is_caught(world: Any) -> None:
    expected = run(TileGroup(), 7)
    got = assemble(world(2).run(run, 7, True))
    assert worst_difference({"logits": got["logits"]}, {"logits": expected["logits"]}) <= TOLERANCE
    assert worst_difference(got, expected) > 1e-4


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_dropout_masks_belong_to_tiles(world: Any, ranks: int) -> None:
    arguments = (False, {"dropout": 0.25})
    for k in (2, 33):
        expected = run(TileGroup(), k, *arguments)
        assert worst_difference(expected, run(TileGroup(), k)) > 1e-3, "dropout is really on"
        group = TileGroup()
        got = [run(group, k, *arguments)] if ranks == 1 else world(ranks).run(run, k, *arguments)
        assert worst_difference(assemble(got), expected) <= TOLERANCE, f"K = {k}"


def test_every_dropout_of_the_layers_is_keyed() -> None:
    layers = make_aggregator(dropout=0.25).transformer.layers
    names = [m.layer for m in layers.modules() if isinstance(m, KeyedDropout)]
    assert len(names) == len(set(names)) == 2 * len(layers)
    assert not any(isinstance(module, nn.Dropout) for module in layers.modules() if getattr(module, "p", 0))


def expected_position(coords: Tensor) -> Tensor:
    """The code, a number at a time."""
    code = torch.zeros(len(coords), WIDTH, dtype=torch.float64)
    quarter = WIDTH // 4
    for tile, place in enumerate((coords - coords.min(dim=0).values).tolist()):
        for axis, value in enumerate(place):
            for i in range(quarter):
                angle = value / 10_000 ** (i / quarter)
                code[tile, 2 * axis * quarter + i] = math.sin(angle)
                code[tile, (2 * axis + 1) * quarter + i] = math.cos(angle)
    return code


def test_equals_plain_pytorch() -> None:
    """PyTorch's own encoder layers, fed with the same parameters: forward and gradients."""
    features, coords = make_bag(33)
    aggregator = make_aggregator()
    ours = aggregator.transformer
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    plain = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH, dtype=torch.float64), enable_nested_tensor=False)
    names = {
        "attention_norm": "norm1",
        "query_key_value.": "self_attn.in_proj_",
        "attention_output": "self_attn.out_proj",
        "mlp_norm": "norm2",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }

    def renamed(name: str) -> str:
        for here, there in names.items():
            name = name.replace(here, there)
        return name

    plain.load_state_dict({renamed(name): value.clone() for name, value in ours.state_dict().items()})
    x = features.clone().requires_grad_()
    y = features.clone().requires_grad_()
    got = ours(aggregator.projection(x), coords, TileGroup())
    expected = plain((aggregator.projection(y) + expected_position(coords))[None])[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(got)
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    assert x.grad.abs().max() > 1e-3
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[renamed(name)].grad, rtol=0, atol=1e-11, msg=name)


def test_order_of_tiles_does_not_matter_and_their_places_do() -> None:
    aggregator = make_aggregator()
    features, coords = make_bag(33)
    logits, weights = aggregator(features, coords, TileGroup())
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    shuffled, their_weights = aggregator(features[order], coords[order], TileGroup())
    torch.testing.assert_close(shuffled, logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(their_weights, weights[order], rtol=0, atol=1e-12)
    elsewhere, _ = aggregator(features, coords[order], TileGroup())
    assert (elsewhere - logits).abs().max() > 1e-3
    mirrored, _ = aggregator(features, coords.flip(1), TileGroup())
    assert (mirrored - logits).abs().max() > 1e-3, "x is told from y"
    moved, _ = aggregator(features, coords + 1000, TileGroup())
    torch.testing.assert_close(moved, logits, rtol=0, atol=1e-9)  # the code counts from the bag's corner


def test_tiles_attend_to_each_other() -> None:
    """Another tile's features change this one's weight relative to a third's; without layers they do not."""
    for layers, depends in ((0, False), (1, True)):
        aggregator = make_aggregator(transformer_layers=layers)
        features, coords = make_bag(7)
        _, before = aggregator(features, coords, TileGroup())
        features[6] += 1
        _, after = aggregator(features, coords, TileGroup())
        assert bool(((before[0] / before[1]) - (after[0] / after[1])).abs() > 1e-4) == depends


def test_position_code_of_a_corner() -> None:
    code = encode_position(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), 8)
    assert code[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    expected = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01), 0, 0, 1, 1]
    torch.testing.assert_close(code[1], torch.tensor(expected))


class LargestSide(TorchDispatchMode):
    """Records every operator's outputs that have two sides of at least `k`, in forward and backward."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.operators: set[str] = set()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.operators.add(str(func))
        for tensor in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(tensor, Tensor) and sum(side >= self.k for side in tensor.shape) >= 2:
                self.found.append((str(func), tuple(tensor.shape)))
        return outputs


def spied_step(group: TileGroup, dtype: torch.dtype) -> LargestSide:
    k = 1024
    aggregator = make_aggregator(transformer_layers=1).to(dtype)
    features, coords = (x.to(dtype) for x in make_bag(k))
    # the shortest side that a block of scores could have on this rank
    with LargestSide(k // group.size) as spy:
        logits, _ = aggregator(features[group.share(k)].requires_grad_(), coords, group)
        logits.sum().backward()
    return spy


def found_by_spy(group: TileGroup, dtype: torch.dtype) -> list[Any]:
    spy = spied_step(group, dtype)
    flash = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert {f"{flash}.default", f"{flash}_backward.default"} <= spy.operators, "the fused kernel really ran, both ways"
    return spy.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rank_holds_all_scores(world: Any, dtype: torch.dtype) -> None:
    assert found_by_spy(TileGroup(), dtype) == []
    assert world(2).run(found_by_spy, dtype) == [[], []]


def test_the_spy_sees_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "FUSED", [SDPBackend.MATH])
    spy = spied_step(TileGroup(), torch.float32)
    assert any(shape[-2:] == (1024, 1024) for _, shape in spy.found)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's reasons against each kernel
def test_missing_kernel_is_told() -> None:
    """Never a quiet change to the path that holds all scores."""
    query = torch.randn(5, 4)
    with sdpa_kernel(SDPBackend.MATH):  # attend's own choice is the one that counts
        assert attend(query, torch.randn(7, 8), 2).shape == (5, 4)
    with pytest.raises(RuntimeError, match="No available kernel|not implemented"):
        attend(query.to(torch.complex64), torch.randn(7, 8).to(torch.complex64), 2)


def test_no_query_still_takes_part() -> None:
    query = torch.empty(0, 4, requires_grad=True)
    key_value = torch.randn(7, 8, requires_grad=True)
    attended = attend(query, key_value, 2)
    assert attended.shape == (0, 4)
    attended.sum().backward()
    assert query.grad.shape == (0, 4)
    assert key_value.grad.shape == (7, 8) and not key_value.grad.any()


def test_rows_and_coordinates_must_agree() -> None:
    features, coords = make_bag(7)
    with pytest.raises(AssertionError, match="rank 0 of 1 has 6 rows of features, and tiles .* of 7"):
        make_aggregator()(features[:6], coords, TileGroup())


def bf16_step(group: TileGroup) -> tuple[Outcome, str]:
    aggregator = make_aggregator().float()
    features, coords = (x.float() for x in make_bag(33))
    own = features[group.share(33)].clone().requires_grad_()
    streams = []
    aggregator.transformer.layers[1].attention_norm.register_forward_hook(lambda m, i, o: streams.append((i[0], o)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = aggregator(own, coords, group)
    logits.float().sum().backward()
    (stream, normed) = streams[0]
    assert stream.dtype == normed.dtype == torch.float32, "residuals and norms are fp32"
    gradients = {name: group.sum(p.grad) / group.size for name, p in aggregator.named_parameters()}
    return {"logits": logits.detach().float(), "features": own.grad / group.size} | gradients, str(logits.dtype)


def test_under_bf16_autocast(world: Any) -> None:
    expected, dtype = bf16_step(TileGroup())
    assert dtype == "torch.bfloat16", "autocast is really on"
    got = [outcome for outcome, _ in world(3).run(bf16_step)]
    whole = assemble(got)
    for name, value in expected.items():
        # bf16 keeps 8 bits: gradients that pass through a few products of it agree to some percent
        scale = float(value.norm().clamp_min(1e-2))
        assert float((whole[name] - value).norm()) <= 0.05 * scale, name


def test_parameters_in_bf16_beside_rows_in_fp32() -> None:
    """What FSDP2 leaves a layer when it gathers parameters in bf16."""
    aggregator = make_aggregator().bfloat16()
    features, coords = make_bag(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = aggregator(features.float(), coords.float(), TileGroup())
    logits.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in aggregator.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gather_rows_of_every_dtype(world: Any, dtype: torch.dtype) -> None:
    """Ragged and empty parts; and gradients that bf16 could not add up."""
    for rank, (rows, gradient) in enumerate(world(3).run(gather_numbers, dtype)):
        assert rows.dtype == gradient.dtype == dtype
        assert rows.tolist() == [[0.0, 0.5], [2.0, 2.5], [2.0, 2.5]]
        # 1 + 2^-8 + 2^-8 is 1 when each sum is rounded to bf16
        assert gradient.tolist() == [[1 + 2**-7] * 2] * (1, 0, 2)[rank]


def gather_numbers(group: TileGroup, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    counts = (1, 0, 2)
    x = torch.tensor([[group.rank, group.rank + 0.5]], dtype=dtype).expand(counts[group.rank], 2).clone()
    x.requires_grad_()
    rows = collectives.all_gather_rows(x, counts, None)
    rows.backward(torch.full_like(rows, 1.0 if group.rank == 0 else 2**-8))
    return rows.detach(), x.grad
