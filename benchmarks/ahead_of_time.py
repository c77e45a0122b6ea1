"""Compile Triton kernels for GPUs that need not be there, and tell what each takes of one."""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from slidescale.engine.markdown import table

KIB = 1024


class Shape(NamedTuple):
    """Of the attention: tiles, width of features and gate, branches. And of the tiles: how many, of how many pixels."""

    k: int
    dim: int
    width: int
    branches: int
    tiles: int
    tile_px: int


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
    Architecture("gfx90a", "MI250X", "hip", "gfx90a", 64, 64 * KIB, 64 * KIB, 512, 512, 8, 8, 192e12, 48e12, 1638e9),
    Architecture("gfx942", "MI300X", "hip", "gfx942", 64, 64 * KIB, 64 * KIB, 512, 512, 8, 8, 1307e12, 163e12, 5300e9),
]


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


def compile_all() -> list[Compiled]:
    """Compile all variants for all architectures, by as many processes as there are processors."""
    os.environ.pop("TRITON_INTERPRET", None)  # which would make kernels of another kind, that cannot be compiled
    jobs = len(all_variants())
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        return [each for compiled in tqdm(pool.map(_compile, range(jobs)), total=jobs) for each in compiled]


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


def theory(shape: Shape) -> list[tuple[str, float, float]]:
    """Of each kernel in bf16: its FLOPs, and the bytes it moves if features are read from memory once."""
    k, dim, width, branches = shape.k, shape.dim, shape.width, shape.branches
    product, features, gate, scores = 2.0 * k * 2 * width * dim, 2.0 * k * dim, 2.0 * k * 2 * width, 4.0 * k * branches
    values = shape.tiles * shape.tile_px**2 * 3
    return [
        ("pool_block", product + 2 * k * branches * (width + dim), features + scores),
        ("score_gradient", 2.0 * k * branches * dim, features + 3 * scores),
        ("gate_gradient", product + 4 * k * branches * width, features + scores + gate),
        ("features_gradient", product + 2 * k * branches * dim, gate + scores + features),
        ("weights_gradient", product, gate + features),
        ("prepare_patch", 2.0 * values, 3.0 * values),
    ]


def describe(compiled: list[Compiled], shape: Shape) -> str:
    """The tables, and in a sentence what they come to."""
    names = [each.name for each in ARCHITECTURES]
    by_label: dict[str, dict[str, Compiled]] = {}
    for each in compiled:
        by_label.setdefault(each.label, {})[each.architecture] = each
    faulty = [f"{each.label} on {each.architecture}" for each in compiled if not each.fits]
    verdict = f"{len(faulty)} do not fit: {'; '.join(faulty)}" if faulty else "no register spills, and all fit"
    limits = [
        [
            each.name,
            each.device,
            f"{each.registers}",
            f"{each.shared / KIB:.0f}",
            f"{each.half / 1e12:.0f}",
            f"{each.bandwidth / 1e9:,.0f}",
        ]
        for each in ARCHITECTURES
    ]
    taken = [
        [label, str(forms[names[0]].warps), *[_cell(forms[name]) for name in names]]
        for label, forms in by_label.items()
    ]
    roofs = []
    for name, flops, moved in theory(shape):
        least = [each.roofline(flops, moved, half=name != "prepare_patch") for each in ARCHITECTURES]
        roofs.append(
            [name, f"{flops / 1e9:.2f}", f"{moved / 1e6:.0f}", f"{flops / moved:.0f}"]
            + [f"{1e6 * seconds:.0f} ({bound})" for seconds, bound in least]
        )
    return "\n\n".join(
        [
            "## Compiled ahead of time",
            f"Every Triton kernel in every form that it is launched in: {len(by_label)} forms, {len(compiled)} "
            f"compilations; {verdict}.",
            table(["architecture", "device", "registers", "shared KiB", "TFLOP/s, 16 bits", "GB/s"], limits),
            "Registers of a thread / KiB of shared memory of a block / occupancy by arithmetic, from these and the "
            "block's threads. A matrix product needs little occupancy: its blocks wait for memory that "
            "they asked for before.",
            table(["kernel", "warps", *names], taken),
            f"Rooflines in bf16, at K = {shape.k:,}, D = {shape.dim}, L = {shape.width}, {shape.branches} branch"
            f"{'es' * (shape.branches > 1)}, and {shape.tiles} tiles of {shape.tile_px} px: the work of each kernel, "
            "and the least microseconds that it could take by data sheet. Features that a program reads again count "
            "once, since they come from the L2 cache then; the gate's gradient counts as moved, though it may "
            "stay in there.",
            table(["kernel", "GFLOP", "MB", "FLOP/byte", *[f"{name}, µs" for name in names]], roofs),
        ]
    )


def _cell(form: Compiled) -> str:
    spills = f" / SPILLS {form.spilled}" if form.spilled else ""
    return f"{form.registers} / {form.shared / KIB:.0f} / {form.occupancy:.0%}{spills}"
