"""Compare what Triton would compile at each launch of gated attention's kernels with what is compiled ahead of time.

Run as a script, in a process in which Triton does not emulate: it prints JSON. Nothing is launched.
"""

import itertools
import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from slidescale.kernels.gated_attention import GateDropout, backward, forward
from slidescale.kernels.gated_attention.variants import DTYPES, variants

Form = tuple[Any, ...]
NAMES = {
    forward: ["pool_block"],
    backward: ["score_gradient", "gate_gradient", "features_gradient", "weights_gradient"],
}


def form_of(name: str, signature: dict[str, str], constexprs: dict[str, Any], aligned: set[str], warps: int) -> Form:
    return (name, *signature.items(), *sorted(constexprs.items()), *sorted(aligned), warps)


class Recorder:
    """In place of a kernel: notes the form it would be compiled in, as Triton's own launcher works it out."""

    def __init__(self, kernel: Any, seen: set[Form]) -> None:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.kernel, self.seen = kernel, seen
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid[:1]) and all(0 < size < 2**16 for size in grid[1:])

        def launch(*args: Any, **settings: Any) -> None:
            values, specialization, options = self.bind(*args, **settings)
            signature = {name: word for name, (word, _) in zip(values, specialization, strict=True)}
            constexprs = {name: values[name] for name, word in signature.items() if word == "constexpr"}
            aligned = {name for name, (_, what) in zip(values, specialization, strict=True) if "D" in str(what)}
            self.seen.add(form_of(self.kernel.__name__, signature, constexprs, aligned, options["num_warps"]))

        return launch


def record() -> set[Form]:
    """The forms of launches with all settings, and awkward sizes and places in memory."""
    seen: set[Form] = set()
    for module, names in NAMES.items():
        for name in names:
            setattr(module, name, Recorder(getattr(module, name), seen))
    for (features_dtype, dtype), p, branches in itertools.product(DTYPES, (0.0, 0.25), (1, 3, 20)):
        for k, dim, width, shift in ((1, 16, 16, 0), (300, 100, 72, 1), (16, 64, 1, 3)):
            features = torch.zeros(k * dim + shift, dtype=features_dtype)[shift:].view(k, dim)
            weights, biases = torch.zeros(2 * width, dim), torch.zeros(2 * width + shift)[shift:]
            w, c = torch.zeros(branches, width), torch.zeros(branches + shift)[shift:]
            mask = torch.ones(k + shift, dtype=torch.bool)[shift:] if shift else None
            dropout = GateDropout(p, 2**62, 5) if p else None
            forward.forward(features, weights, biases, w, c, mask, dropout, dtype)
            m, scores = torch.zeros(branches + shift)[shift:], torch.zeros(k, branches)
            grads = torch.zeros(k, branches), m, torch.zeros(branches * dim + shift)[shift:].view(branches, dim)
            backward.backward(*grads, features, weights, biases, w, scores, m, dropout, dtype)
    return seen


def main() -> None:
    compiled = {
        form_of(each.kernel.__name__, each.signature, each.constexprs, set(each.aligned), each.num_warps): each.label
        for each in variants()
    }
    launched = record()
    unknown = [str(form) for form in launched - set(compiled)]
    print(json.dumps({"launched": len(launched), "unknown": unknown, "unused": [
        label for form, label in compiled.items() if form not in launched
    ]}))  # fmt: skip


if __name__ == "__main__":
    main()
