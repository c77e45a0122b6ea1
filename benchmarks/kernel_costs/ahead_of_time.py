"""Triton kernels compiled for GPUs that need not be there, and what each takes of one."""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kernel_costs.architectures import ARCHITECTURES, Architecture


@dataclass(frozen=True)
class Compiled:
    """A form of a kernel, compiled for an architecture.

    Attributes:
        warps: per block.
        registers: per thread.
        spilled: bytes of stack per thread (NVIDIA) or registers (AMD) that did not fit into registers.
        shared: bytes of shared memory per block.
        occupancy: see `Architecture.occupancy`.
    """

    label: str
    architecture: str
    warps: int
    registers: int
    spilled: int
    shared: int
    occupancy: float

    @property
    def fits(self) -> bool:
        """Whether it keeps to the architecture's limits, and spills nothing."""
        limits = next(each for each in ARCHITECTURES if each.name == self.architecture)
        return self.spilled == 0 and self.shared <= limits.shared and self.registers <= limits.registers


def all_variants() -> list[Any]:
    """List every kernel in every form in which it can be launched."""
    from slidescale.kernels.gated_attention.variants import variants as gated_attention
    from slidescale.kernels.tile_prep.fused import variants as tile_prep

    return [*gated_attention(), *tile_prep()]


def compile_all() -> list[Compiled]:
    """Compile all forms for all architectures, with one process per processor."""
    return compile_forms(range(len(all_variants())))


def compile_forms(places: Sequence[int]) -> list[Compiled]:
    """Compile the forms at these places of `all_variants` for all architectures."""
    os.environ.pop("TRITON_INTERPRET", None)  # its kernels cannot be compiled
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        return [each for form in tqdm(pool.map(_compile, places), total=len(places)) for each in form]


def _compile(index: int) -> list[Compiled]:
    """Compile one form, named by its place in the list: a kernel cannot be sent to another process."""
    variant = all_variants()[index]
    return [_compile_for(variant, each) for each in ARCHITECTURES]


def _compile_for(variant: Any, architecture: Architecture) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {name: (place,) for place, name in enumerate(variant.kernel.arg_names)}
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constexprs,
        attrs={places[name]: [["tt.divisibility", 16]] for name in variant.aligned},
    )
    binary = triton.compile(
        source,
        target=GPUTarget(architecture.backend, architecture.target, architecture.warp),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    if architecture.is_amd:
        words = dict(re.findall(r"\.(\w+):\s*(\d+)", binary.asm["amdgcn"]))
        registers = int(words["vgpr_count"])
        spilled = int(words["vgpr_spill_count"]) + int(words["sgpr_spill_count"])
    else:
        usage = dict(re.findall(r"(\w+):(\d+)", _resource_usage(binary.asm["cubin"])))
        registers, spilled = int(usage["REG"]), int(usage["STACK"])
    shared = binary.metadata.shared
    occupancy = architecture.occupancy(registers, shared, variant.num_warps)
    return Compiled(variant.label, architecture.name, variant.num_warps, registers, spilled, shared, occupancy)


def _resource_usage(cubin: bytes) -> str:
    """Return what NVIDIA's cuobjdump, which comes with Triton, prints about the one kernel in a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
