"""The engine's steps beside plain single-process autograd; runs on every rank of a world."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slidescale.engine.config import Config, MemoryConfig, ModelConfig, RunConfig
from slidescale.engine.data.bag import Bag
from slidescale.engine.data.manifest import ManifestRow
from slidescale.engine.errors import TrainingError
from slidescale.engine.models.aggregator import Aggregator
from slidescale.engine.models.encoder import Encoder
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.objective import CrossEntropy
from slidescale.engine.parallel.strategy import SingleStrategy, Strategy
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.parallel.zero import ZeroStrategy
from slidescale.engine.trainer import Trainer

# Slides' tile counts, a step each. With 3 ranks: uneven shares, ranks without a tile (K = 2), one with all (K = 1).
# More than three steps, because several faults are right at the first step and wrong from the second.
BAG_SIZES = (7, 5, 1, 2, 11)
TILE_PX = 32
LEARNING_RATE = 0.05


class MeanReducer(SingleStrategy):
    """Hand-written data parallelism in any dtype: each gradient's mean over ranks, as DeepSpeed's reducers take it."""

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        yield
        for parameter in self.model.parameters():
            assert parameter.grad is not None, "every parameter gets a gradient on every rank"
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def make_model(encoder: str, aggregator_name: Any, dtype: torch.dtype) -> SlideModel:
    """A small model; without dropout, whose masks plain autograd would draw otherwise.

    Args:
        aggregator_name: a pooling, with "+slide_norm" or without.
    """
    pooling, _, slide_norm = aggregator_name.partition("+")
    torch.manual_seed(0)
    tiles = Encoder(encoder, tile_px=TILE_PX)
    aggregator = Aggregator(
        tiles.dim, 2, pooling=pooling, hidden_dim=16, attention_dim=8, dropout=0.0, slide_norm=bool(slide_norm)
    )
    return SlideModel(tiles, aggregator).to(dtype)


def make_bags() -> list[tuple[Bag, Tensor]]:
    """Bags with all their tiles, uint8 `[K, 32, 32, 3]`."""
    generator = torch.Generator().manual_seed(1)
    bags = []
    for index, k in enumerate(BAG_SIZES):
        row = ManifestRow(f"slide-{index}", f"case-{index}", Path("none"), index % 2, "train")
        tiles = torch.randint(0, 256, (k, TILE_PX, TILE_PX, 3), dtype=torch.uint8, generator=generator)
        bags.append((Bag(row, torch.zeros(k, 2).long().numpy(), seed=index), tiles))
    return bags


def plain_autograd(model: SlideModel) -> dict[str, Tensor]:
    """Parameters after a plain step on each bag, all tiles in one graph."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for bag, tiles in make_bags():
        logits, _ = model.aggregate(model.encode(tiles), TileGroup())
        nn.functional.cross_entropy(logits[None], torch.tensor([bag.row.label])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def make_strategy(name: str, model: SlideModel) -> Strategy:
    """A strategy that steps with plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    if not name.startswith("zero"):
        kind = {"single": SingleStrategy, "mean": MeanReducer}[name]
        return kind(model, optimizer, None, device=torch.device("cpu"), clip=0.0)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        # What a run under bf16 passes: the model's own autocast must not make DeepSpeed round its gradients.
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "zero_optimization": {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0},
    }
    return ZeroStrategy(model, [{"params": list(model.parameters())}], optimizer, None, ds_config=ds_config)


def train(group: TileGroup, strategy: Strategy, chunk: int) -> None:
    """The trainer's own step on each bag, with this rank's share of the tiles."""
    config = Config(run=RunConfig(name="test"), model=ModelConfig(), memory=MemoryConfig(chunk=chunk))
    unused: Any = None
    objective = CrossEntropy((), 2)
    trainer = Trainer(config, unused, strategy, objective, unused, unused, unused, group, unused)
    strategy.model.train()
    for bag, tiles in make_bags():
        trainer.train_step(bag, tiles[group.share(bag.k)])


def worst_error(expected: dict[str, Tensor], model: SlideModel) -> float:
    """Largest ‖p − p'‖ / ‖p‖ over parameters."""
    import deepspeed

    worst = 0.0
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            difference = (parameter.detach() - expected[name]).norm() / expected[name].norm().clamp_min(1e-3)
        worst = max(worst, float(difference))
    return worst


def compare(
    group: TileGroup,
    strategy: str,
    pooling: str,
    *,
    chunk: int = 2,
    encoder: str = "test_resnet",
    dtype: torch.dtype = torch.float32,
    mutation: Callable[[], Any] | None = None,
) -> float:
    """Worst relative parameter error of the engine after all steps; `mutation` is a context that plants a bug."""
    start = {name: p.detach().clone() for name, p in make_model(encoder, pooling, dtype).named_parameters()}
    expected = plain_autograd(make_model(encoder, pooling, dtype))
    moved = sum(float((expected[name] - start[name]).norm()) for name in start)
    assert moved > 1e-2, "the reference must have learnt something, or equality proves nothing"
    model = make_model(encoder, pooling, dtype)
    engine = make_strategy(strategy, model)
    if mutation is None:
        train(group, engine, chunk)
    else:
        with mutation():
            train(group, engine, chunk)
    return worst_error(expected, model)


@contextmanager
def dropped_merge_term() -> Iterator[None]:
    """The last rank's features are left out of the merge (its weights are not: K = 1 would divide by zero)."""
    original = TileGroup.merge

    def merge(self: TileGroup, partial: Any) -> Tensor:
        if self.rank == self.size - 1:
            partial = partial._replace(acc=partial.acc * 0)
        return original(self, partial)

    TileGroup.merge = merge  # type: ignore[method-assign]
    try:
        yield
    finally:
        TileGroup.merge = original  # type: ignore[method-assign]


@contextmanager
def skipped_chunk() -> Iterator[None]:
    """The encoder never hears of the gradient of each bag's first chunk."""
    from slidescale.engine import trainer

    original = trainer.backpropagate

    def backpropagate(model: Any, chunks: Any, gradient: Tensor, backward: Any) -> None:
        gradient[: chunks.size] = 0
        original(model, chunks, gradient, backward)

    trainer.backpropagate = backpropagate
    try:
        yield
    finally:
        trainer.backpropagate = original


def refused_step(group: TileGroup, strategy: str, what: str) -> tuple[str, float]:
    """The error of a step whose loss or gradient is not finite, and how far the parameters moved in it."""
    model = make_model("test_resnet", "mean", torch.float32)
    engine = make_strategy(strategy, model)
    before = plain_copy(model)

    class Broken(CrossEntropy):
        def forward(self, logits: Tensor, label: int) -> Tensor:
            loss = super().forward(logits, label)
            if what == "loss":
                return loss * torch.nan
            loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss

    config = Config(run=RunConfig(name="test"), model=ModelConfig(), memory=MemoryConfig(chunk=2))
    unused: Any = None
    trainer = Trainer(config, unused, engine, Broken((), 2), unused, unused, unused, group, unused)
    bag, tiles = make_bags()[0]
    try:
        trainer.train_step(bag, tiles[group.share(bag.k)])
    except TrainingError as error:
        return str(error), worst_error(before, model)
    return "no error", worst_error(before, model)


def plain_copy(model: SlideModel) -> dict[str, Tensor]:
    """The parameters, whole also under ZeRO-3."""
    import deepspeed

    copies = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            copies[name] = parameter.detach().clone()
    return copies
