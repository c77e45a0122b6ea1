"""A Triton kernel in one of the forms that it is launched in: what compiling it ahead of time takes."""

from typing import Any, NamedTuple

import torch

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Variant(NamedTuple):
    """A kernel with the types of its arguments and its compile-time constants.

    Attributes:
        kernel: the `@triton.jit` function.
        signature: of each argument by name, Triton's word for its type; "constexpr" for constants.
        constexprs: values of the constants.
        aligned: arguments that are known to be multiples of 16 (pointers: of 16 bytes).
        num_warps, num_stages: as at the launch.
        label: for people.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int
    label: str
