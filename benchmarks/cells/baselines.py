"""Other ways to train on all tiles of a slide, with which the engine is compared."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.parallel.tile_parallel import TileGroup
from slidescale.engine.strategies.optim import make_optimizer, parameter_groups
from slidescale.engine.supervision.classes import CrossEntropy
from slidescale.engine.training.stopwatch import Stopwatch

from cells.drawn_slide import tile_coords
from cells.ways import CLASSES, Cell, Source, Way

LABEL = 1.0
# Tiles whose features are computed at once where no gradient is wanted.
FROZEN_CHUNK = {"cpu": 16, "cuda": 128}
# Tiles in memory at once while the features of a slide are computed.
FROZEN_PORTION = 512


class Baseline(Way):
    """What baselines share: the model, optimizer and loss of a recipe."""

    def __init__(self, cell: Cell, source: Source, device: torch.device) -> None:
        super().__init__(cell, source, device)
        self._model = self.model()
        self._model.encoder.requires_grad_(cell.parts == "all")
        optim = cell.config().optim
        self._optimizer = make_optimizer(parameter_groups(self._model, optim), optim)
        self._objective = CrossEntropy((), len(CLASSES)).to(device)
        self._watch = Stopwatch(device)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's own."""
        for name, parameter in self._model.named_parameters():
            yield name, parameter.detach()

    def _loss(self, model: SlideModel, features: Tensor) -> Tensor:
        k, side = len(features), self.cell.tile
        places = torch.from_numpy(tile_coords(k, side) / side).to(self.device, torch.float32)
        logits, _ = model.aggregate(features, places, TileGroup())
        return self._objective(logits, torch.tensor([LABEL], dtype=torch.float64, device=self.device))

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


class Plain(Baseline):
    """Plain autograd: all tiles in one forward and one backward.

    Policy "checkpoint" recomputes the activations inside each block of the encoder by PyTorch's checkpointing (Chen et
    al. 2016, arXiv:1604.06174).
    """

    def __init__(self, cell: Cell, source: Source, device: torch.device) -> None:
        super().__init__(cell, source, device)
        self._model.encoder.set_checkpointing(cell.policy == "checkpoint")

    def steps(self, k: int, count: int) -> Iterator[dict[str, float]]:
        """Train with a single graph; its backward is reported as pass 2."""
        watch = self._watch
        watch.start()
        for bag in self.source.bags(k, count, slice(0, k)):
            tiles = bag.to(self.device, non_blocking=True)
            watch.lap("reading")
            features = self._model.encode(tiles)
            watch.lap("pass 1")
            loss = self._loss(self._model, features)
            watch.lap("aggregate")
            loss.backward()
            watch.lap("pass 2")
            self._update()
            watch.lap("optimizer")
            del loss, features
            yield watch.seconds()
            watch.start()


class Frozen(Baseline):
    """Steps of the aggregator alone, on features that are computed once and read from disk."""

    def __init__(self, cell: Cell, source: Source, device: torch.device) -> None:
        super().__init__(cell, source, device)
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "features.pt"

    def prepare(self, k: int) -> None:
        """Compute the features; the row has the time that this takes as `features_s`."""
        begin = time.perf_counter()
        torch.save(self._encode(k), self._file)
        self.details["features_s"] = time.perf_counter() - begin

    def steps(self, k: int, count: int) -> Iterator[dict[str, float]]:
        """Train the aggregator."""
        watch = self._watch
        for _ in range(count):
            watch.start()
            features = torch.load(self._file, map_location=self.device, weights_only=True)
            watch.lap("reading")
            self._loss(self._model, features).backward()
            watch.lap("aggregate")
            self._update()
            watch.lap("optimizer")
            yield watch.seconds()

    def close(self) -> None:
        """End what runs beside, and delete the features."""
        super().close()
        self._folder.cleanup()

    def _encode(self, k: int) -> Tensor:
        parts = []
        for begin in range(0, k, FROZEN_PORTION):
            for tiles in self.source.bags(k, 1, slice(begin, min(k, begin + FROZEN_PORTION))):
                for chunk in tiles.split(FROZEN_CHUNK[self.device.type]):
                    with torch.no_grad():
                        parts.append(self._model.encode(chunk.to(self.device, non_blocking=True)))
        return torch.cat(parts)


class Hub(Baseline):
    """The published schedule: one rank for the aggregator, which encodes nothing, and all others for the encoder.

    Encoder ranks run DistributedDataParallel in a group of their own. Each has its part of the tiles in one forward and
    keeps all activations. Between two barriers of all ranks, features are gathered at the hub, and their gradients are
    scattered back. DDP takes the mean over W - 1 ranks, so each rank back-propagates Σ h · ∂L/∂h times W - 1.
    (Campanella et al. 2024, and the trainer released with it; written from their description.)
    """

    def __init__(self, cell: Cell, source: Source, device: torch.device) -> None:
        super().__init__(cell, source, device)
        self._rank, self._encoders = dist.get_rank(), dist.get_world_size() - 1
        self.tile_ranks = self._encoders
        group = dist.new_group(list(range(1, self._encoders + 1)))
        if self._rank:
            self._encoder = DistributedDataParallel(self._model.encoder, process_group=group)
        self._bf16 = cell.dtype == "bfloat16"

    def steps(self, k: int, count: int) -> Iterator[dict[str, float]]:
        """Train; the hub waits for features in pass 1, and for the backward of other ranks in pass 2."""
        return self._aggregate(k, count) if self._rank == 0 else self._encode(k, count)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield those of the encoder from its first rank, and those of the aggregator from the hub."""
        for name, parameter in self._model.named_parameters():
            dist.broadcast(parameter.detach(), src=1 if name.startswith("encoder.") else 0)
            yield name, parameter.detach()

    def _wait(self) -> None:
        """Wait for the devices of all ranks: a step ends with the slowest device, and a barrier joins only hosts."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def _share(self, k: int, rank: int) -> slice:
        return TileGroup(rank - 1, self._encoders).share(k)

    def _rows(self, k: int) -> int:
        """Rows of the largest share: parts that are gathered or scattered have equal sizes."""
        return -(-k // self._encoders)

    def _aggregate(self, k: int, count: int) -> Iterator[dict[str, float]]:
        watch, size = self._watch, (self._rows(k), self._model.encoder.dim)
        shares = [self._share(k, rank) for rank in range(1, self._encoders + 1)]
        for _ in range(count):
            watch.start()
            own = torch.zeros(size, device=self.device)
            parts = [torch.empty_like(own) for _ in range(self._encoders + 1)]
            dist.barrier()
            dist.gather(own, parts, dst=0)
            watch.lap("pass 1")
            rows = [part[: share.stop - share.start] for part, share in zip(parts[1:], shares, strict=True)]
            features = torch.cat(rows).requires_grad_()
            self._loss(self._model, features).backward()
            assert features.grad is not None
            gradients = [own, *(torch.zeros_like(own) for _ in range(self._encoders))]
            for gradient, share in zip(gradients[1:], shares, strict=True):
                gradient[: share.stop - share.start] = features.grad[share]
            watch.lap("aggregate")
            dist.scatter(torch.empty_like(own), gradients, src=0)
            dist.barrier()
            self._update()
            watch.lap("optimizer")
            self._wait()
            watch.lap("pass 2")
            yield watch.seconds()

    def _encode(self, k: int, count: int) -> Iterator[dict[str, float]]:
        watch, share = self._watch, self._share(k, self._rank)
        own = share.stop - share.start
        watch.start()
        for bag in self.source.bags(k, count, share):
            tiles = bag.to(self.device, non_blocking=True)
            watch.lap("reading")
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16):
                features = self._encoder(tiles).float()
            sent = torch.zeros(self._rows(k), features.shape[1], device=self.device)
            sent[:own] = features.detach()
            watch.lap("pass 1")
            dist.barrier()
            dist.gather(sent, dst=0)
            gradient = torch.empty_like(sent)
            dist.scatter(gradient, src=0)
            dist.barrier()
            watch.lap("aggregate")
            ((features * gradient[:own]).sum() * self._encoders).backward()
            watch.lap("pass 2")
            self._update()
            watch.lap("optimizer")
            del features
            self._wait()
            yield watch.seconds()
            watch.start()


KINDS: dict[str, type[Baseline]] = {"plain": Plain, "checkpoint": Plain, "frozen": Frozen, "hub": Hub}
