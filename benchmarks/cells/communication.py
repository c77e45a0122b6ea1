"""Counts of communication: bytes that a rank hands to its process groups and sends, by phase of the step."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slidescale.engine.training.stopwatch import Stopwatch

# Namespaces of operators that communicate. One of these operators that is neither in OPERATIONS nor in SILENT is an
# error, and not a hole in the count.
NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "symm_mem", "deepspeed")
SILENT = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd", "c10d::check_for_nan")
# The share of the payload that a rank sends among n ranks: in a ring, in equal parts (Patarasuk and Yuan 2009,
# doi:10.1016/j.jpdc.2008.09.002). For operations that have a root, the share of the rank that sends most.
SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "broadcast": lambda n: float(n > 1),
    "reduce": lambda n: float(n > 1),
    "gather": lambda n: (n > 1) / n,
    "scatter": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
    "receive": lambda n: 0.0,
    "barrier": lambda n: 0.0,
}


@dataclass(frozen=True)
class Operation:
    """How an operator of PyTorch is counted.

    Attributes:
        name: one of SENT.
        argument: argument of the operator whose tensors are the payload.
        part: these tensors are the part of one rank, and there are as many parts as ranks.
    """

    name: str
    argument: str
    part: bool = False


OPERATIONS = {
    "c10d::allreduce_": Operation("all-reduce", "tensors"),
    "c10d::allreduce_coalesced_": Operation("all-reduce", "tensors"),
    "c10d::allgather_": Operation("all-gather", "output_tensors"),
    "c10d::_allgather_base_": Operation("all-gather", "output_tensor"),
    "c10d::allgather_coalesced_": Operation("all-gather", "output_lists"),
    "c10d::allgather_into_tensor_coalesced_": Operation("all-gather", "outputs"),
    "c10d::reduce_scatter_": Operation("reduce-scatter", "input_tensors"),
    "c10d::_reduce_scatter_base_": Operation("reduce-scatter", "input_tensor"),
    "c10d::reduce_scatter_tensor_coalesced_": Operation("reduce-scatter", "inputs"),
    "c10d::alltoall_": Operation("all-to-all", "input_tensors"),
    "c10d::alltoall_base_": Operation("all-to-all", "input"),
    "c10d::broadcast_": Operation("broadcast", "tensors"),
    "c10d::reduce_": Operation("reduce", "tensors"),
    # Only the root has the whole.
    "c10d::gather_": Operation("gather", "input_tensors", part=True),
    "c10d::gather_into_tensor_": Operation("gather", "input_tensor", part=True),
    "c10d::scatter_": Operation("scatter", "output_tensors", part=True),
    "c10d::send": Operation("send", "tensors"),
    "c10d::recv_": Operation("receive", "tensors"),
    "c10d::recv_any_source_": Operation("receive", "tensors"),
    "c10d::barrier": Operation("barrier", ""),
    "c10d::monitored_barrier_": Operation("barrier", ""),
    "_c10d_functional::all_reduce": Operation("all-reduce", "input"),
    "_c10d_functional::all_reduce_": Operation("all-reduce", "input"),
    "_c10d_functional::all_reduce_coalesced": Operation("all-reduce", "inputs"),
    "_c10d_functional::all_reduce_coalesced_": Operation("all-reduce", "inputs"),
    "_c10d_functional::all_gather_into_tensor": Operation("all-gather", "input", part=True),
    "_c10d_functional::all_gather_into_tensor_out": Operation("all-gather", "input", part=True),
    "_c10d_functional::all_gather_into_tensor_coalesced": Operation("all-gather", "inputs", part=True),
    "_c10d_functional::reduce_scatter_tensor": Operation("reduce-scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_out": Operation("reduce-scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_coalesced": Operation("reduce-scatter", "inputs"),
    "_c10d_functional::all_to_all_single": Operation("all-to-all", "input"),
    "_c10d_functional::broadcast": Operation("broadcast", "input"),
    "_c10d_functional::broadcast_": Operation("broadcast", "input"),
}


@dataclass(frozen=True)
class Call:
    """One call of a collective operation.

    Attributes:
        operation: one of SENT.
        ranks: number of ranks that take part.
        payload: bytes of the tensor in an all-reduce, of the result in an all-gather, of the input in a
            reduce-scatter.
    """

    operation: str
    ranks: int
    payload: int

    @property
    def wire(self) -> float:
        """Bytes that a rank sends."""
        return SENT[self.operation](self.ranks) * self.payload


class Communication(TorchDispatchMode):
    """While entered, notes all calls of collectives by the thread that entered it, and by its backward passes.

    The collectives of PyTorch, DTensor, FSDP2 and DeepSpeed all end in operators, which it sees. It does not see what
    the implementation of an operator sends on its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[str, list[Call]] = {}
        self._unclaimed: list[Call] = []

    def lap(self, phase: str) -> None:
        """Count the calls since the last lap under `phase`."""
        self._calls.setdefault(phase, []).extend(self._unclaimed)
        self._unclaimed = []

    def calls(self) -> dict[str, list[Call]]:
        """Return all calls by phase, in their order.

        Raises:
            RuntimeError: there were calls after the last lap.
        """
        if self._unclaimed:
            raise RuntimeError(f"{len(self._unclaimed)} calls after the last lap, the first is {self._unclaimed[0]}")
        return self._calls

    def summary(self) -> dict[str, list[dict[str, Any]]]:
        """Return the sums of each phase, operation and number of ranks, for JSON."""
        return {phase: list(_sums(calls)) for phase, calls in self.calls().items() if calls}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a collective, and run every operator as it is."""
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor calls operators on plain tensors, which come here in their turn
        if isinstance(func, torch._ops.OpOverload) and func.namespace in NAMESPACES:
            self._note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _note(self, func: "torch._ops.OpOverload", args: tuple, kwargs: dict[str, Any]) -> None:
        name = func.name().split(".")[0]
        if name in SILENT:
            return
        if name not in OPERATIONS:
            raise LookupError(f"{name} sends an unknown number of bytes: add it to OPERATIONS or SILENT")
        operation = OPERATIONS[name]
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        ranks = _group(given).size()
        size = sum(leaf.nbytes for leaf in tree_leaves(given.get(operation.argument)) if isinstance(leaf, Tensor))
        self._unclaimed.append(Call(operation.name, ranks, size * ranks if operation.part else size))


class CountingStopwatch(Stopwatch):
    """A stopwatch whose laps also divide communication; what was sent between steps belongs to reading."""

    def __init__(self, device: torch.device, communication: Communication) -> None:
        super().__init__(device)
        self._communication = communication

    def lap(self, phase: str) -> None:
        """Count what has passed since the last lap under `phase`."""
        super().lap(phase)
        self._communication.lap(phase)


def total(phases: dict[str, list[dict[str, Any]]], what: str, *, operation: str | None = None) -> float:
    """Add up "calls", "payload" or "wire" over phases of `Communication.summary`, for one operation or all."""
    return sum(
        each[what] for phase in phases.values() for each in phase if operation is None or each["operation"] == operation
    )


def _sums(calls: list[Call]) -> Iterator[dict[str, Any]]:
    counts = Counter((call.operation, call.ranks) for call in calls)
    for (operation, ranks), count in counts.items():
        same = [call for call in calls if (call.operation, call.ranks) == (operation, ranks)]
        yield {
            "operation": operation,
            "ranks": ranks,
            "calls": count,
            "payload": sum(call.payload for call in same),
            "wire": sum(call.wire for call in same),
        }


def _group(given: dict[str, Any]) -> dist.ProcessGroup:
    group = given["process_group"] if "process_group" in given else given["group_name"]
    if isinstance(group, str):
        return _resolve_process_group(group)
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)
