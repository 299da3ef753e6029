"""Triton kernels of swiglu.py: a program takes a piece of a row, so that rows of any width fill the device evenly."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launching

BLOCK = 2048  # columns of a program


@triton.jit(do_not_specialize=["both_step", "out_step"])
def _swiglu(both, out, both_step, out_step, UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pieces: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    both += row * both_step * UNIT
    gate = tl.load(both + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_step * UNIT + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["grad_step", "both_step"])
def _swiglu_backward(grad, both, grad_step, both_step, UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pieces: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    both += row * both_step * UNIT
    grad += row * grad_step * UNIT
    gate = tl.load(both + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    grown = tl.load(grad + columns, mask=inside, other=0.0).to(tl.float32)
    gated = tl.sigmoid(gate)
    opened = gate * gated
    tl.store(grad + columns, (opened * up).to(grad.dtype.element_ty), mask=inside)
    grad_gate = grown * up * (gated + opened * (1 - gated))
    tl.store(both + columns, grad_gate.to(both.dtype.element_ty), mask=inside)
    tl.store(both + WIDTH + columns, (grown * opened).to(both.dtype.element_ty), mask=inside)


def swiglu(both: Tensor, out: Tensor) -> bool:
    """See swiglu.py. False, with nothing written, for types or strides that the kernel does not take."""
    return _start(_swiglu, both, out, len(out), out.shape[1])


def swiglu_backward(grad: Tensor, both: Tensor) -> bool:
    """See swiglu.py. False, with nothing written, for types or strides that the kernel does not take."""
    return _start(_swiglu_backward, grad, both, len(grad), grad.shape[1])


def _start(kernel: object, first: Tensor, second: Tensor, rows: int, width: int) -> bool:
    if not launching.accepts(first, second):
        return False
    unit = launching.unit_of(first, second)
    block = min(BLOCK, launching.power_of_two(width))
    launching.start(
        kernel, rows * triton.cdiv(width, block), first, second, first.stride(0) // unit, second.stride(0) // unit,
        UNIT=unit, WIDTH=width, BLOCK=block, num_warps=launching.warps_for(block),
    )  # fmt: skip
    return True
