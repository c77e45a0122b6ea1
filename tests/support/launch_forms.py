"""Compare what Triton would compile at each launch with what is compiled ahead of time.

Run as a script, in a process in which Triton does not emulate: it prints JSON. Nothing is launched.
"""

import itertools
import json
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from slidescale.kernels.gated_attention import Gate, GateDropout, backward, forward, gated_attention
from slidescale.kernels.gated_attention import operator as attention_operator
from slidescale.kernels.gated_attention.variants import variants as attention_variants
from slidescale.kernels.tile_prep import fused, prepare_tiles
from slidescale.kernels.tile_prep import operator as tile_operator

Form = tuple[Any, ...]
NAMES = {
    forward: ["pool_block"],
    backward: ["score_gradient", "gate_gradient", "features_gradient", "weights_gradient"],
    fused: ["prepare_patch"],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def form_of(name: str, signature: dict[str, str], constexprs: dict[str, Any], aligned: set[str], warps: int) -> Form:
    return (name, *signature.items(), *sorted(constexprs.items()), *sorted(aligned), warps)


class Recorder:
    """In place of a kernel: notes the form it would be compiled in, as Triton's own launcher works it out."""

    def __init__(self, kernel: Any, seen: set[Form]) -> None:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.kernel, self.seen = kernel, seen
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert 0 < grid[0] < 2**31
        assert all(0 < size < 2**16 for size in grid[1:])

        def launch(*args: Any, **settings: Any) -> None:
            values, specialization, options = self.bind(*args, **settings)
            signature = {name: word for name, (word, _) in zip(values, specialization, strict=True)}
            constexprs = {name: values[name] for name, word in signature.items() if word == "constexpr"}
            aligned = {name for name, (_, what) in zip(values, specialization, strict=True) if "D" in str(what)}
            self.seen.add(form_of(self.kernel.__name__, signature, constexprs, aligned, options["num_warps"]))

        return launch


def shifted(shape: tuple[int, ...], shift: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that begin `shift` values behind where memory was allocated."""
    return torch.zeros(shift + torch.Size(shape).numel(), dtype=dtype)[shift:].view(shape)


def attend_in_all_ways() -> None:
    """All dtypes and settings, and awkward sizes and places in memory."""
    for dtype, gate_dtype, autocast in itertools.product(DTYPES, DTYPES, (None, torch.bfloat16, torch.float16)):
        for p, branches in itertools.product((0.0, 0.25), (1, 3, 20)):
            for k, dim, width, shift in ((1, 16, 16, 0), (300, 100, 72, 1), (16, 64, 1, 3)):
                shapes = ((width, dim), (width,), (width, dim), (width,), (branches, width), (branches,))
                gate = Gate(*(shifted(shape, shift, gate_dtype).requires_grad_() for shape in shapes))
                features = shifted((k, dim), shift, dtype).requires_grad_()
                mask = shifted((k,), shift, torch.bool) if shift else None
                dropout = GateDropout(p, 2**62, 5) if p else None
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    scores, partial = gated_attention(features, gate, mask=mask, dropout=dropout, kernels="triton")
                grads = [shifted(tuple(each.shape), shift) for each in (scores, partial.l, partial.acc)]
                torch.autograd.backward((scores, partial.l, partial.acc), grads)


def prepare_in_all_ways() -> None:
    """Tiles of all kinds of sides, at all kinds of places."""
    for dtype, turned, recoloured in itertools.product(DTYPES, (False, True), (False, True)):
        for side, shift in ((224, 0), (224, 1), (100, 0), (33, 0), (33, 5), (1, 0), (16, 3)):
            prepare_tiles(
                shifted((2, side, side, 3), shift, torch.uint8),
                shifted((3,), shift),
                shifted((3,), shift) + 1,
                dtype=dtype,
                symmetry=shifted((2,), shift, torch.uint8) if turned else None,
                colour=shifted((2, 3, 4), shift) if recoloured else None,
                kernels="triton",
            )


def main() -> None:
    compiled = {
        form_of(each.kernel.__name__, each.signature, each.constexprs, set(each.aligned), each.num_warps): each.label
        for each in (*attention_variants(), *fused.variants())
    }
    launched: set[Form] = set()
    for module, names in NAMES.items():
        for name in names:
            setattr(module, name, Recorder(getattr(module, name), launched))
    with mock.patch.object(attention_operator, "check_triton"), mock.patch.object(tile_operator, "check_triton"):
        attend_in_all_ways()
        prepare_in_all_ways()
    unknown = [str(form) for form in launched - set(compiled)]
    unused = [label for form, label in compiled.items() if form not in launched]
    print(json.dumps({"launched": len(launched), "unknown": unknown, "unused": unused}))


if __name__ == "__main__":
    main()
