"""GPU architectures: what a kernel may take of one, and what it does at best."""

from dataclasses import dataclass
from typing import Any

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """The limits of a GPU for kernels, and its peak performance.

    Attributes:
        device: an accelerator of this architecture.
        backend, target, warp: its names and warp size in Triton.
        shared: most bytes of shared memory per block of threads.
        shared_all: bytes of shared memory per multiprocessor.
        registers: most registers per thread.
        register_file: registers per multiprocessor (AMD: per lane of one of its four SIMDs).
        granule: number of registers in whose multiples a warp (AMD: a lane) gets them.
        warps: most warps at once per multiprocessor (AMD: per SIMD).
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
        """Share of the warps that a multiprocessor can hold which run at once, for a kernel with `warps` per block.

        As in NVIDIA's occupancy calculator: blocks compete for registers and shared memory. AMD: waves on each of four
        SIMDs.
        """
        by_shared = self.shared_all // shared if shared else 10**6
        if self.is_amd:
            waves = min(self.warps, self.register_file // (-(-registers // self.granule) * self.granule))
            blocks = min(4 * waves // warps, by_shared)
            return blocks * warps / (4 * self.warps)
        per_warp = -(-registers * 32 // self.granule) * self.granule
        blocks = min(self.register_file // per_warp // warps, by_shared, self.warps // warps)
        return blocks * warps / self.warps

    def roofline(self, flops: float, moved: float, *, half: bool) -> tuple[float, str]:
        """Return the least seconds for this many FLOPs and bytes, and which of the two limits."""
        compute, memory = flops / (self.half if half else self.single), moved / self.bandwidth
        return max(compute, memory), "compute" if compute > memory else "memory"


# CUDA C++ programming guide, "Technical specifications per compute capability" (a block may
# take the shared memory of a multiprocessor less 1 KiB); AMD CDNA 2 and 3 instruction set guides: 64 KiB of local
# memory, 512 registers per lane of a SIMD, in granules of 8, eight waves. Peaks: the data sheets named in
# engine/memory/devices.py; MI250X: its data sheet (2021), one of its two dies.
ARCHITECTURES = [
    Architecture("sm_80", "A100", "cuda", 80, 32, 163 * KIB, 164 * KIB, 255, 65536, 256, 64, 312e12, 19.5e12, 2039e9),
    Architecture("sm_90", "H100", "cuda", 90, 32, 227 * KIB, 228 * KIB, 255, 65536, 256, 64, 989e12, 67e12, 3350e9),
    Architecture("sm_100", "B200", "cuda", 100, 32, 227 * KIB, 228 * KIB, 255, 65536, 256, 64, 2250e12, 75e12, 8000e9),
    Architecture("gfx90a", "MI250X", "hip", "gfx90a", 64, 64 * KIB, 64 * KIB, 512, 512, 8, 8, 192e12, 48e12, 1638e9),
    Architecture("gfx942", "MI300X", "hip", "gfx942", 64, 64 * KIB, 64 * KIB, 512, 512, 8, 8, 1307e12, 163e12, 5300e9),
]
