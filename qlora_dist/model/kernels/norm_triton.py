"""Triton kernels of norm.py: a program holds a row in registers, so that each element is read and written once.

Rows of more than LONGEST columns are read twice, in pieces: for the statistics and for the result.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launching

LONGEST = 16384  # columns


@triton.jit(do_not_specialize=["x_step", "out_step"])
def _rms_norm(
    x, weight, scales, out, x_step, out_step, eps, UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_step * UNIT
    out += row * out_step * UNIT
    columns = tl.arange(0, BLOCK)
    if BLOCK >= WIDTH:
        inside = columns < WIDTH
        value = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
        if scales is not None:
            tl.store(scales + row, scale)
        result = value * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + columns, result.to(out.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            value = tl.load(x + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
            squares += value * value
        scale = tl.rsqrt(tl.sum(squares) / WIDTH + eps)
        if scales is not None:
            tl.store(scales + row, scale)
        for start in range(0, WIDTH, BLOCK):
            inside = start + columns < WIDTH
            value = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
            result = value * scale * tl.load(weight + start + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + start + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["grad_step", "x_step", "residual_step", "out_step"])
def _rms_norm_backward(
    grad, x, weight, residual, out, grad_step, x_step, residual_step, out_step, eps,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad += row * grad_step * UNIT
    x += row * x_step * UNIT
    out += row * out_step * UNIT
    if residual is not None:
        residual += row * residual_step * UNIT
    columns = tl.arange(0, BLOCK)
    if BLOCK >= WIDTH:
        inside = columns < WIDTH
        value = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
        weighted = tl.load(grad + columns, mask=inside, other=0.0).to(tl.float32)
        weighted *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
        mean = tl.sum(weighted * value) * scale / WIDTH
        result = scale * (weighted - value * scale * mean)
        if residual is not None:
            result += tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + columns, result.to(out.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            inside = start + columns < WIDTH
            value = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
            weighted = tl.load(grad + start + columns, mask=inside, other=0.0).to(tl.float32)
            weighted *= tl.load(weight + start + columns, mask=inside, other=0.0).to(tl.float32)
            squares += value * value
            products += weighted * value
        scale = tl.rsqrt(tl.sum(squares) / WIDTH + eps)
        mean = tl.sum(products) * scale / WIDTH
        for start in range(0, WIDTH, BLOCK):
            inside = start + columns < WIDTH
            value = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
            weighted = tl.load(grad + start + columns, mask=inside, other=0.0).to(tl.float32)
            weighted *= tl.load(weight + start + columns, mask=inside, other=0.0).to(tl.float32)
            result = scale * (weighted - value * scale * mean)
            if residual is not None:
                result += tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + start + columns, result.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, scales: Tensor | None, out: Tensor) -> bool:
    """See norm.py. False, with nothing written, for types or strides that the kernel does not take."""
    if not launching.accepts(x, weight, scales, out):
        return False
    unit, width = launching.unit_of(x, out), x.shape[-1]
    block = min(LONGEST, launching.power_of_two(width))
    launching.start(
        _rms_norm, len(x), x, weight, scales, out, x.stride(0) // unit, out.stride(0) // unit, eps,
        UNIT=unit, WIDTH=width, BLOCK=block, num_warps=launching.warps_for(block),
    )  # fmt: skip
    return True


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor
) -> bool:
    """See norm.py. False, with nothing written, for types or strides that the kernel does not take."""
    if not launching.accepts(grad, x, weight, residual, out):
        return False
    unit, width = launching.unit_of(grad, x, residual, out), x.shape[-1]
    block = min(LONGEST, launching.power_of_two(width))
    steps = [0 if t is None else t.stride(0) // unit for t in (grad, x, residual, out)]
    launching.start(
        _rms_norm_backward, len(x), grad, x, weight, residual, out, *steps, eps,
        UNIT=unit, WIDTH=width, BLOCK=block, num_warps=launching.warps_for(block),
    )  # fmt: skip
    return True
