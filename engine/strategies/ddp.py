"""Data parallelism: every rank holds the whole model, and gradients meet once per step.

PyTorch's DistributedDataParallel reduces in the backward of a module's own forward; a step here has many backwards,
through two modules, so their sum is reduced once, when it is complete.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.strategies.strategy import SingleStrategy

# Gradients travel in flat buckets of this size, the one DistributedDataParallel takes: large enough for a network's
# bandwidth, small enough that the copy does not count.
BUCKET_BYTES = 25 * 1024**2


class DdpStrategy(SingleStrategy):
    """Plain PyTorch on every rank, and the mean of gradients over all of them."""

    name = "ddp"

    def __init__(
        self,
        model: SlideModel,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        *,
        device: torch.device,
        clip: float,
    ) -> None:
        super().__init__(model, optimizer, scheduler, device=device, clip=clip)
        self._ranks = dist.get_world_size()
        with torch.no_grad():  # all ranks start from the main one's weights, wherever each had its own from
            for bucket in _buckets([*model.parameters(), *model.buffers()]):
                _through_flat(bucket, lambda flat: dist.broadcast(flat, src=0))

    @contextmanager
    def accumulate(self, backwards: int) -> Iterator[None]:
        """Add up locally, then take the mean over ranks."""
        yield
        grads = [parameter.grad for parameter in _trained(self.model) if parameter.grad is not None]
        for bucket in _buckets(grads):
            _through_flat(bucket, self._mean)

    def save(self, folder: Path) -> None:
        """The main rank's copy, which is everyone's."""
        if dist.get_rank() == 0:
            super().save(folder)

    def _mean(self, flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat /= self._ranks


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype, up to a bucket's size (or one that alone is larger)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _through_flat(tensors: list[Tensor], change: Callable[[Tensor], object]) -> None:
    """Change tensors in place through one flat copy of them."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    change(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
