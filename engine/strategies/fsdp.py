"""FSDP2: PyTorch's own sharding of parameters, gradients and optimizer state.

What `fully_shard` does under many backwards per step, with graphs of several chunks alive at once, was measured, not
assumed, and `tests/test_equivalence.py` pins it.
"""

import collections
import io
import pathlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slidescale.engine.errors import UserError
from slidescale.engine.models.slide_model import SlideModel
from slidescale.engine.strategies.state_files import load_known, load_plain
from slidescale.engine.strategies.strategy import TorchStrategy

# It warns of outputs that are views, which an in-place operation would cut from its hooks; the step has none on them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

# Blocks of the encoder with at least this many parameters are gathered one at a time; smaller ones are not worth a
# message of their own and are gathered with what surrounds them.
UNIT_NUMEL = 1_000_000

# All that the metadata of a distributed checkpoint may name. None of these does anything but hold values.
_IN_METADATA: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.BytesStorageMetadata,
        metadata.TensorStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )
}
_IN_METADATA |= {
    (kind.__module__, kind.__name__): kind for kind in (pathlib.PosixPath, pathlib.WindowsPath, collections.OrderedDict)
}
_IN_METADATA |= {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype | torch.layout)
}
_IN_METADATA |= {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}


class FsdpStrategy(TorchStrategy):
    """Every rank holds a shard of the model and gathers a block's parameters while it computes with them.

    Args:
        mesh: one dimension to shard over, or two (copies × shards).
        optimizer: makes one for the model, once that is sharded.
        scheduler: makes a schedule for the optimizer.
        clip: the largest gradient norm to step with; 0 leaves gradients as they are.
        offload: keep shards, gradients and optimizer state in the host's memory.
        hold: gather all parameters once per step, and not for each chunk.
        gather: dtype that parameters are gathered and computed with; None is their own.
        unit_numel: see UNIT_NUMEL.
    """

    name = checkpoint_format = "fsdp"

    def __init__(
        self,
        model: SlideModel,
        mesh: DeviceMesh,
        optimizer: Callable[[SlideModel], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        *,
        device: torch.device,
        clip: float,
        offload: bool = False,
        hold: bool = False,
        gather: torch.dtype | None = None,
        unit_numel: int = UNIT_NUMEL,
    ) -> None:
        settings: dict[str, Any] = {
            "mesh": mesh,
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
            # Gradients add up over chunks, and over ranks, in fp32 whatever they were computed in.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=gather, reduce_dtype=torch.float32 if gather else None, cast_forward_inputs=False
            ),
            "reshard_after_forward": not hold,
        }
        for unit in (*_units(model.encoder, unit_numel), model.encoder, model.aggregator, model):
            fully_shard(unit, **settings)
        for method in ("encode", "aggregate"):
            register_fsdp_forward_method(model, method)
        assert isinstance(model, FSDPModule)
        made = optimizer(model)
        super().__init__(model, made, scheduler(made) if scheduler else None, device=device, clip=clip)
        self._root: FSDPModule = model
        self._hold = hold
        self._backwards = 0

    @contextmanager
    def accumulate(self, backwards: int) -> Iterator[None]:
        """Add up locally in all backwards but the last, which reduces; FSDP2 gives no other moment for it."""
        self._backwards = backwards
        self._root.set_requires_gradient_sync(False)
        self._root.set_is_last_backward(False)
        if self._hold:
            self._root.set_reshard_after_backward(False)
        yield
        assert self._backwards == 0, f"{self._backwards} backwards fewer than announced"

    def backward(self, loss: Tensor) -> None:
        """Autograd, with FSDP2's hooks."""
        self._backwards -= 1
        if self._backwards == 0:
            self._root.set_requires_gradient_sync(True)
            self._root.set_is_last_backward(True)
            self._root.set_reshard_after_backward(True)
        loss.backward()

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Gathered from its shards, on this rank's device also where they wait in the host's memory."""
        sharded = parameter.detach().to(self.device)
        assert isinstance(sharded, DTensor)
        return sharded.full_tensor()

    def save(self, folder: Path) -> None:
        """PyTorch's distributed checkpoint: each rank its shards."""
        dcp.save(self._state(), checkpoint_id=folder / "state")

    def load(self, folder: Path) -> None:
        """Read `save`'s shards, on any number of ranks."""
        state = self._state()
        try:
            dcp.load(state, storage_reader=_Reader(folder / "state"), planner=_Planner())
        except CheckpointException as error:  # the same on every rank
            cause, _ = next(iter(error.failures.values()))
            raise cause if isinstance(cause, UserError) else UserError(f"cannot load {folder}: {cause}") from None
        set_state_dict(
            self.model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])

    def _state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self._optimizer)
        scheduler = self._scheduler.state_dict() if self._scheduler else {}
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


class _Reader(filesystem.FileSystemReader):
    """Reads checkpoints as PyTorch does, without running what their metadata, which are a pickle, may hold.

    Raises:
        UserError: the metadata hold something else, or are damaged; on every rank alike, for all read the same file.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self._metadata = load_known(folder / ".metadata", _IN_METADATA)
        if not isinstance(self._metadata, metadata.Metadata):
            raise UserError(f"{folder / '.metadata'} is damaged: it is a {type(self._metadata).__name__}")

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Say what the checkpoint holds and where; called once for each load."""
        self._metadata.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return self._metadata


class _Planner(dcp.DefaultLoadPlanner):
    """Reads what is not a tensor (counts, rates) as plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Hand a value on to PyTorch's planner, once it is known to be plain."""
        load_plain(value, f"{read_item.dest_index.fqn} of the checkpoint")
        value.seek(0)
        super().load_bytes(read_item, value)


def _units(module: nn.Module, numel: int) -> Iterator[nn.Module]:
    """The innermost blocks of a network's sequences that have enough parameters, in the order of their nesting."""
    for child in module.children():
        if not isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _units(child, numel)
            continue
        for block in child:
            if sum(parameter.numel() for parameter in block.parameters()) >= numel:
                inner = list(_units(block, numel))
                yield from inner or [block]
