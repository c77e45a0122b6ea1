"""Compile Triton kernels for GPUs that need not be there, and read off what each takes of one."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """What a kernel may take, and what the chip does at best.

    Attributes:
        device: an accelerator of this architecture.
        backend, target, warp: as Triton names it.
        shared: bytes of shared memory that one block of threads may take.
        shared_all: of a multiprocessor.
        registers: of a thread, at most.
        register_file: of a multiprocessor (AMD: for each lane of one of its four SIMDs).
        granule: registers are given out in multiples of so many to a warp (AMD: to each lane).
        warps: that a multiprocessor (AMD: one SIMD) holds at once, at most.
        half, single: FLOP/s of products of 16-bit and 32-bit numbers, by the data sheet, without sparsity.
        bandwidth: of its memory, bytes/s.
    """

    name: str
    device: str
    backend: str
    target: Any
    warp: int
    shared: int
    shared_all: int
    registers: int
    register_file: int
    granule: int
    warps: int
    half: float
    single: float
    bandwidth: float

    @property
    def is_amd(self) -> bool:
        """Whether it has SIMDs of 64 lanes."""
        return self.backend == "hip"

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Share of the warps a multiprocessor can hold that run at once, for a kernel with `warps` in a block.

        By NVIDIA's occupancy calculator: registers and shared memory are what blocks compete for. AMD: waves on each
        of four SIMDs.
        """
        by_shared = self.shared_all // shared if shared else 10**6
        if self.is_amd:
            waves = min(self.warps, self.register_file // (-(-registers // self.granule) * self.granule))
            blocks = min(4 * waves // warps, by_shared)
            return blocks * warps / (4 * self.warps)
        a_warp = -(-registers * 32 // self.granule) * self.granule
        blocks = min(self.register_file // a_warp // warps, by_shared, self.warps // warps)
        return blocks * warps / self.warps

    def roofline(self, flops: float, moved: float, *, half: bool) -> tuple[float, str]:
        """Least seconds for so many FLOPs and bytes, and which of the two it is that limits."""
        compute, memory = flops / (self.half if half else self.single), moved / self.bandwidth
        return max(compute, memory), "compute" if compute > memory else "memory"


# CUDA C++ programming guide, "Technical specifications per compute capability" (a multiprocessor's shared memory less
# 1 KiB a block is what one block may take); AMD CDNA 2 and 3 instruction set guides: 64 KiB of local memory, 512
# registers for each lane of a SIMD, in granules of 8, eight waves. Peaks: the data sheets named in
# engine/memory/devices.py; MI250X: its data sheet (2021), one of its two dies.
ARCHITECTURES = [
    Architecture("sm_80", "A100", "cuda", 80, 32, 163 * KIB, 164 * KIB, 255, 65536, 256, 64, 312e12, 19.5e12, 2039e9),
    Architecture("sm_90", "H100", "cuda", 90, 32, 227 * KIB, 228 * KIB, 255, 65536, 256, 64, 989e12, 67e12, 3350e9),
    Architecture("sm_100", "B200", "cuda", 100, 32, 227 * KIB, 228 * KIB, 255, 65536, 256, 64, 2250e12, 75e12, 8000e9),
    Architecture("gfx90a", "MI250X", "hip", "gfx90a", 64, 64 * KIB, 64 * KIB, 512, 512, 8, 8, 191.5e12, 47.9e12, 1638e9),
    Architecture("gfx942", "MI300X", "hip", "gfx942", 64, 64 * KIB, 64 * KIB, 512, 512, 8, 8, 1307e12, 163.4e12, 5300e9),
]  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A variant of a kernel on an architecture.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's stack (NVIDIA), or registers (AMD), that did not fit into registers.
        shared: bytes of shared memory of a block.
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
    """Every kernel in every form that it can be launched in."""
    from slidescale.kernels.gated_attention.variants import variants as gated_attention
    from slidescale.kernels.tile_prep.fused import variants as tile_prep

    return [*gated_attention(), *tile_prep()]


def compile_all() -> Iterator[Compiled]:
    """Compile all variants for all architectures, by as many processes as there are processors."""
    os.environ.pop("TRITON_INTERPRET", None)  # which would make kernels of another kind, that cannot be compiled
    jobs = len(all_variants())
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        for compiled in pool.map(_compile, range(jobs), chunksize=1):
            yield from compiled


def _compile(index: int) -> list[Compiled]:
    """One variant, by its place in the list: a kernel does not travel between processes."""
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
    """What NVIDIA's cuobjdump, which Triton carries, says of the one kernel in a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
