"""Tables of compiled kernels: what they take of each architecture, and how fast they could be there."""

from common.page import table
from kernel_costs.ahead_of_time import Compiled
from kernel_costs.architectures import ARCHITECTURES, KIB
from kernel_costs.work import Shape


def theory(shape: Shape) -> list[tuple[str, float, float]]:
    """List each kernel in bf16 with its FLOPs, and its bytes if features are read from memory once."""
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


def compiled_tables(compiled: list[Compiled], shape: Shape) -> str:
    """Write what was compiled as Markdown, with a verdict in a sentence."""
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
            f"Every Triton kernel in every form in which it is launched: {len(by_label)} forms, {len(compiled)} "
            f"compilations; {verdict}.",
            table(["architecture", "device", "registers", "shared KiB", "TFLOP/s, 16 bits", "GB/s"], limits),
            "Registers per thread / KiB of shared memory per block / occupancy by arithmetic, from these and the "
            "threads per block. A matrix product needs little occupancy: its blocks wait for memory that "
            "they have requested in advance.",
            table(["kernel", "warps", *names], taken),
            f"Rooflines in bf16, at K = {shape.k:,}, D = {shape.dim}, L = {shape.width}, {shape.branches} branch"
            f"{'es' * (shape.branches > 1)}, and {shape.tiles} tiles of {shape.tile_px} px: the work of each kernel, "
            "and the least microseconds that it could take by data sheet. Features that a program reads again count "
            "once, since they then come from the L2 cache. The gradient of the gate counts as moved, though it may "
            "stay in the cache.",
            table(["kernel", "GFLOP", "MB", "FLOP/byte", *[f"{name}, µs" for name in names]], roofs),
        ]
    )


def _cell(form: Compiled) -> str:
    spills = f" / SPILLS {form.spilled}" if form.spilled else ""
    return f"{form.registers} / {form.shared / KIB:.0f} / {form.occupancy:.0%}{spills}"
