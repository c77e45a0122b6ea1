"""The engine is exact: its parameters after several steps are those of plain autograd over all tiles.

`make test` runs configurations in which every two values of two settings meet, `make test-full` whole grids of them.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from support import faults
from support.compared import TOLERANCE, GetWorld, check
from support.equivalence import Case, compare, compare_all, losses_of, predictions
from support.grids import full
from support.memory_slides import BAG_SIZES
from support.narrow import READ_BUT_NOT_CALLED
from support.pairwise import pairwise
from support.zero_gathers import gathers

STRATEGIES = [
    "single",
    "ddp",
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero2+offload",
    "zero3+offload",
    "fsdp",
    "fsdp+offload",
]
AGGREGATORS = ["mean", "gated_attention", "gathered", "transformer+mean"]
OPTIMIZERS = ["sgd", "adamw"]
WORLDS = [(name, ranks) for name in STRATEGIES for ranks in ([1] if name == "single" else [1, 2, 3])]
# With every tile in one chunk there are no chunks to store some of.
POLICIES = [(policy, chunk) for policy in ("keep", "recompute", "offload", "auto-1", "auto-2") for chunk in (1, 3)]
POLICIES += [(policy, max(BAG_SIZES) + 1) for policy in ("keep", "recompute", "offload")]

# What a configuration is made of; slides is (tile_ranks, accumulate).
SETTINGS: dict[str, list[Any]] = {
    "strategy": [*STRATEGIES, "fsdp+hold", "fsdp+tiles"],
    "ranks": [1, 2, 3],
    "policy": ["keep", "recompute", "offload", "auto-1"],
    "aggregator": AGGREGATORS,
    "chunk": [1, 3, max(BAG_SIZES) + 1],
    "encoder": ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"],
    "slides": [(0, 1), (1, 1), (0, 2)],
    "optimizer": OPTIMIZERS,
    "dropout": [0.0, 0.3],
    "checkpoint_blocks": [False, True],
    "branches": [1, 3],
}


def can_run(chosen: dict[str, Any]) -> bool:
    """Whether these settings can go together, as far as they are chosen."""
    one_process = chosen.get("strategy") != "single" or chosen.get("ranks", 1) == 1
    stores_some = not chosen.get("policy", "").startswith("auto") or chosen.get("chunk") != max(BAG_SIZES) + 1
    attends = chosen.get("branches") != 3 or chosen.get("aggregator", "gated_attention") == "gated_attention"
    has_blocks = not chosen.get("checkpoint_blocks") or chosen.get("encoder", "test_vit") == "test_vit"
    return one_process and stores_some and attends and has_blocks


PAIRS = pairwise(SETTINGS, can_run)


# One of them in `make test`, all in `make test-full`.
EVA = "eva02_tiny_patch14_224"
NOT_CALLED = [EVA, *full(*(name for name in READ_BUT_NOT_CALLED if name != EVA))]


def make_case(strategy: str, aggregator: str, policy: tuple[str, int], optimizer: str) -> Case:
    dtype = "float32" if strategy.startswith("zero") else "float64"
    return Case(
        strategy=strategy, aggregator=aggregator, policy=policy[0], chunk=policy[1], optimizer=optimizer, dtype=dtype
    )


@pytest.mark.parametrize("strategy", SETTINGS["strategy"])
def test_every_two_settings_equal_plain_autograd(world: GetWorld, strategy: str) -> None:
    """In few configurations."""
    by_ranks: dict[int, list[Case]] = {}
    for chosen in (dict(each) for each in PAIRS if each["strategy"] == strategy):
        ranks, (tile_ranks, accumulate) = chosen.pop("ranks"), chosen.pop("slides")
        dtype = "float32" if strategy.startswith("zero") else "float64"
        case = Case(**chosen, dtype=dtype, tile_ranks=tile_ranks, accumulate=accumulate)
        by_ranks.setdefault(ranks, []).append(case)
    for ranks, cases in by_ranks.items():
        check(world(ranks), cases)


@pytest.mark.full
@pytest.mark.parametrize(("strategy", "ranks"), WORLDS)
def test_strategies_equal_plain_autograd(world: GetWorld, strategy: str, ranks: int) -> None:
    """Each aggregator, each policy, each chunk size and each optimizer, not in all combinations."""
    shift = ranks + STRATEGIES.index(strategy)
    policies = itertools.islice(itertools.cycle(POLICIES), shift, None, 5)
    optimizers = itertools.cycle(OPTIMIZERS)
    cases = [make_case(strategy, name, next(policies), next(optimizers)) for name in AGGREGATORS]
    check(world(ranks), cases)


@pytest.mark.full
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize(("strategy", "ranks"), WORLDS)
def test_all_combinations_equal_plain_autograd(world: GetWorld, strategy: str, ranks: int, aggregator: str) -> None:
    """The whole grid."""
    for optimizer in OPTIMIZERS:
        check(world(ranks), [make_case(strategy, aggregator, policy, optimizer) for policy in POLICIES])


def test_zero_with_small_buckets(world: GetWorld) -> None:
    """Most parameters are larger than a bucket, and the small ones stay whole."""
    check(world(2), [Case(strategy=f"zero{stage}+buckets", policy="auto-1") for stage in (1, 2, 3)])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_other_aggregators(world: GetWorld, ranks: int) -> None:
    """Against a reducer written by hand."""
    names = ["gated_attention", "mean", "max", "transformer+gated_attention"]
    check(world(ranks), [Case(strategy="mean", aggregator=name, dtype="float64", policy="auto-1") for name in names])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, Triton's kernels are compiled: -m gpu")
@pytest.mark.parametrize("ranks", [2, *full(1, 3)])
def test_kernels(world: GetWorld, ranks: int) -> None:
    """Both kinds, for tiles and for attention with several branches, with dropout on its gate."""
    cases = [
        Case(strategy=strategy, policy=policy, kernels=kernels, branches=3, dropout=dropout, chunk=3)
        for strategy, policy, dropout in (("ddp", "auto-1", 0.3), ("zero3", "recompute", 0.0), ("fsdp", "keep", 0.3))
        for kernels in ("triton", "torch")
    ]
    check(world(ranks), cases)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_slide_norm(world: GetWorld, ranks: int) -> None:
    """Over two tiles it divides by their difference, which amplifies rounding some 10,000 times."""
    cases = [
        Case(strategy="ddp", aggregator=name, dtype="float64", policy="auto-1")
        for name in ("gated_attention+slide_norm", "transformer+mean+slide_norm")
    ]
    errors = world(ranks).run(compare_all, cases)
    assert max(map(max, errors)) <= 1e4 * TOLERANCE["float64"], errors


@pytest.mark.full
@pytest.mark.parametrize("policy", ["recompute", "keep", "offload"])
def test_other_encoders(world: GetWorld, policy: str) -> None:
    """Transformer, depth-wise convolutions with LayerNorm, squeeze-and-excitation; ResNet with BatchNorm elsewhere."""
    encoders = ["test_vit", "test_convnext", "test_efficientnet"]
    strategies = [("ddp", "float64"), ("fsdp", "float64"), ("zero3", "float32")]
    check(
        world(2),
        [
            Case(strategy=strategy, encoder=encoder, policy=policy, dtype=dtype)
            for encoder in encoders
            for strategy, dtype in strategies
        ],
    )


def test_zero3_gathers_parameters_of_modules_that_are_not_called(world: GetWorld) -> None:
    """Attention that reads its projection's weights; a bias table that a module outside of it asks for."""
    check(
        world(2),
        [
            Case(strategy="zero3", encoder="eva02_tiny_patch14_224", policy="recompute"),
            Case(strategy="zero3", encoder="swinv2_tiny_window8_256", policy="auto-1", chunk=3),
        ],
    )
    with pytest.raises(AssertionError, match="size mismatch"):
        world(2).run(compare, Case(strategy="zero3", encoder="eva02_tiny_patch14_224"), faults.unmarked_forwards)


@pytest.mark.full
@pytest.mark.parametrize("encoder", READ_BUT_NOT_CALLED)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_network_that_reads_but_does_not_call(world: GetWorld, ranks: int, encoder: str) -> None:
    """Each policy, blocks that are computed again, offloaded parameters, and several slides a step."""
    base = Case(strategy="zero3", encoder=encoder)
    cases = [
        replace(base, policy=policy, chunk=chunk) for policy in ("keep", "recompute", "auto-1") for chunk in (1, 3)
    ]
    cases += [
        replace(base, checkpoint_blocks=True, policy="auto-1"),
        replace(base, strategy="zero3+offload"),
        replace(base, accumulate=2, tile_ranks=1, policy="auto-1", dropout=0.3),
    ]
    check(world(ranks), cases)
    wrong = world(ranks).run(compare, base, faults.skipped_chunk)
    assert min(wrong) > 100 * TOLERANCE["float32"], wrong


@pytest.mark.parametrize("encoder", NOT_CALLED)
def test_zero3_evaluates_parameters_of_modules_that_are_not_called(world: GetWorld, encoder: str) -> None:
    """Without a graph, and before any step."""
    expected = world(1).run(predictions, Case(strategy="ddp", encoder=encoder))[0]
    for found in world(2).run(predictions, Case(strategy="zero3", encoder=encoder)):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[1:] == pytest.approx(theirs[1:], rel=1e-5)


@pytest.mark.parametrize("encoder", NOT_CALLED)
@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_zero3_gives_back_what_it_gathers_on_access(world: GetWorld, policy: str, encoder: str) -> None:
    """Nothing is whole between passes, and a parameter is looked for once only: then it comes with its reader."""
    case = Case(strategy="zero3", encoder=encoder, policy=policy)
    for counted in world(2).run(gathers, case):
        assert counted.left == 0
        assert 0 < counted.on_access < 60
    plain = replace(case, encoder="test_resnet")
    marked, unmarked = (world(2).run(gathers, plain, *how) for how in ((), (faults.unmarked_forwards,)))
    assert marked == unmarked, "other networks gather as before"
    assert marked[0].on_access == 0


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
def test_fsdp_variants(world: GetWorld, ranks: int) -> None:
    """Parameters held over a step; shards over a tile group, with a copy for each."""
    check(
        world(ranks),
        [
            Case(strategy=strategy, policy=policy, dtype="float64", tile_ranks=tile_ranks, encoder="test_vit")
            for strategy in ("fsdp+hold", "fsdp+tiles", "fsdp+tiles+hold")
            for policy in ("recompute", "auto-1")
            for tile_ranks in (0, 1)
        ],
    )


@pytest.mark.parametrize(
    ("ranks", "tile_ranks", "accumulate"),
    [
        (2, 1, 1),
        *full((1, 1, 2), (2, 2, 3), (3, 1, 2), (4, 2, 1)),
    ],
)
def test_several_slides_a_step(world: GetWorld, ranks: int, tile_ranks: int, accumulate: int) -> None:
    """Side by side and one after another; the last step of an epoch has fewer."""
    strategies = [
        ("ddp", "float64"),
        ("fsdp", "float64"),
        ("zero0", "float32"),
        ("zero2", "float32"),
        ("zero3", "float32"),
    ]
    check(
        world(ranks),
        [
            Case(
                strategy=strategy,
                dtype=dtype,
                tile_ranks=tile_ranks,
                accumulate=accumulate,
                policy=policy,
                aggregator=aggregator,
            )
            for strategy, dtype in strategies
            for policy, aggregator in (("recompute", "transformer+mean"), ("auto-1", "gated_attention"))
        ],
    )


@pytest.mark.parametrize(
    ("ranks", "tile_ranks", "accumulate"),
    [
        *full((1, 1, 2), (2, 1, 1), (2, 2, 1), (4, 2, 1)),
        (3, 1, 1),
    ],
)
def test_unreadable_slides_count_as_zero(world: GetWorld, ranks: int, tile_ranks: int, accumulate: int) -> None:
    """One rank finds out; every rank goes on with the step's other slides, and leaves out a step without any."""
    base = Case(strategy="ddp", dtype="float64", tile_ranks=tile_ranks, accumulate=accumulate)
    cases = [
        replace(base, policy="auto-1", unreadable="04", optimizer="adamw"),
        replace(base, policy="offload", unreadable="13"),
        replace(base, policy="offload", unreadable="013", optimizer="adamw", strategy="fsdp"),
        replace(base, policy="auto-1", unreadable="13", strategy="zero3", dtype="float32"),
    ]
    check(world(ranks), cases)


@pytest.mark.parametrize(("ranks", "tile_ranks"), [(2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("unreadable", ["", *full("2"), "4"])
def test_predictions_do_not_depend_on_ranks(world: GetWorld, ranks: int, tile_ranks: int, unreadable: str) -> None:
    """Each tile group predicts slides of its own, and every rank hears of all."""
    case = Case(strategy="ddp", dtype="float64", unreadable=unreadable)
    expected = world(1).run(predictions, case)[0]
    assert len(expected) == len(BAG_SIZES) - len(unreadable)
    for found in world(ranks).run(predictions, replace(case, tile_ranks=tile_ranks)):
        assert [each[0] for each in found] == [each[0] for each in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[1:] == pytest.approx(theirs[1:], rel=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("policy", ["recompute", "keep", "offload", "auto-1"])
def test_activation_checkpointing(world: GetWorld, policy: str) -> None:
    """Blocks that are computed again in the backward, in each policy, with masks drawn again."""
    cases = [
        Case(strategy=strategy, policy=policy, dtype=dtype, encoder="test_vit", dropout=dropout, checkpoint_blocks=True)
        for strategy, dtype in (("ddp", "float64"), ("fsdp", "float64"), ("zero3", "float32"))
        for dropout in (0.0, 0.3)
    ]
    check(world(2), cases)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_dropout_is_that_of_plain_autograd(world: GetWorld, ranks: int) -> None:
    """Masks belong to tiles: no number of ranks, chunk size, policy or spread changes them."""
    cases = [
        Case(
            strategy="ddp",
            dtype="float64",
            encoder="test_vit",
            dropout=0.3,
            aggregator=name,
            policy=policy,
            chunk=chunk,
        )
        for name in ("gated_attention", "gathered", "transformer+mean")
        for policy, chunk in (("recompute", 1), ("auto-1", 3))
    ]
    check(world(ranks), cases)


def test_losses_do_not_depend_on_ranks(world: GetWorld) -> None:
    """With dropout and stochastic depth on."""
    case = Case(strategy="ddp", dtype="float64", encoder="test_vit", dropout=0.3)
    one, *others = (world(ranks).run(losses_of, case)[0] for ranks in (1, 2, 3))
    without = world(1).run(losses_of, Case(strategy="ddp", dtype="float64", encoder="test_vit"))[0]
    assert one != pytest.approx(without, rel=1e-3), "dropout is really on"
    for other in others:
        assert other == pytest.approx(one, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["recompute", "keep", "offload", "auto-1"])
@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp", "fsdp+hold"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gpus_equal_plain_autograd(world: GetWorld, strategy: str, ranks: int, policy: str) -> None:
    """By NCCL, a GPU a rank. In fp32, since neither fused attention nor Triton's kernels take doubles on a GPU; gated
    attention by PyTorch's operators in doubles too.
    """
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} GPUs are needed, and there are {torch.cuda.device_count()}")
    cases = [
        Case(strategy=strategy, policy=policy, aggregator=name, kernels="triton", branches=branches)
        for name, branches in (("gated_attention", 1), ("gated_attention", 3), ("transformer+mean", 1), ("gathered", 1))
    ]
    if not strategy.startswith("zero"):
        cases.append(Case(strategy=strategy, policy=policy, aggregator="gated_attention", dtype="float64"))
    check(world(ranks, "cuda"), cases)
