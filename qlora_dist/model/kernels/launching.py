"""What the launches of all Triton kernels share: which tensors they accept, how they are aligned, how they start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

TYPES = (torch.bfloat16, torch.float16, torch.float32)
PER_THREAD = 16  # elements of a row that a thread holds: two 16-byte vectors of a 16-bit type
MAX_WARPS = 32


def start(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """One launch over a grid of one dimension, the only one that holds more than 65,535 programs."""
    kernel[(num_programs,)](*arguments, **constants)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which knows no machine instructions."""
    return bool(triton.knobs.runtime.interpret)


def accepts(*tensors: Tensor | None) -> bool:
    """Whether kernels can read and write these: 16- or 32-bit floats, contiguous in the last dimension."""
    return all(t is None or (t.dtype in TYPES and (t.stride(-1) == 1 or t.shape[-1] == 1)) for t in tensors)


def unit_of(*tensors: Tensor | None) -> int:
    """Elements that strides are counted in: 8 if that divides all of them, which allows 16-byte vectors, else 1.

    Kernels receive `stride // unit` and multiply by the constant, because the compiler would see only multiples of 16.
    """
    steps = [step for t in tensors if t is not None for step in t.stride()[:-1]]
    return 8 if all(step % 8 == 0 for step in steps) else 1


def power_of_two(number: int) -> int:
    """The next one: kernels compute on powers of two."""
    return int(triton.next_power_of_2(number))


def warps_for(elements: int, per_thread: int = PER_THREAD) -> int:
    """Warps of a program of so many elements, a power of two."""
    return max(1, min(MAX_WARPS, elements // (32 * per_thread)))


def same_type(tensors: Sequence[Tensor]) -> bool:
    """Whether one pointer in the kernel can stand for any of them."""
    return len({t.dtype for t in tensors}) <= 1
