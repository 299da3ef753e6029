"""Triton kernels of lower.py: a program takes ROWS tokens and walks along their columns, the next ones on their way."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...config.joint_products import LARGEST_LOWERED
from . import launching
from .gradients_triton import _once

ROWS, TILE = 32, 128  # tokens of a program, columns that it takes at a time


@triton.jit(do_not_specialize=["x_step", "low_step", "joined_step", "tokens"])
def _lower(
    x, rows, low, joined, x_step, low_step, joined_step, tokens, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, IS_GATED: tl.constexpr,
    IS_OPAQUE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_row = (row < tokens)[:, None]
    k = tl.arange(0, BLOCK)
    kind: tl.constexpr = joined.dtype.element_ty
    x += row[:, None] * x_step * UNIT
    joined += row[:, None] * joined_step * UNIT
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, WIDTH, TILE):
        column = start + tl.arange(0, TILE)
        inside = inside_row & (column < WIDTH)[None, :]
        value = tl.load(x + column[None, :], mask=inside, other=0.0)
        if IS_GATED:
            gate = value.to(tl.float32)
            up = tl.load(x + WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
            value = gate * tl.sigmoid(gate) * up
        value = _once(value.to(kind), IS_OPAQUE)
        tl.store(joined + column[None, :], value, mask=inside)
        inside = (k < COLUMNS)[:, None] & (column < WIDTH)[None, :]
        a = tl.load(rows + k[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        total = tl.dot(value, tl.trans(a), total, input_precision="ieee")
    inside = inside_row & (k < COLUMNS)[None, :]
    tl.store(low + row[:, None] * low_step * UNIT + k[None, :], total.to(kind), mask=inside)
    tl.store(joined + WIDTH + k[None, :], total.to(kind), mask=inside)


def swiglu_lower(both: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> bool:
    """See lower.py. False, with nothing written, for more columns, types or strides than the kernel takes."""
    return _start(both, rows, low, joined, is_gated=True)


def copy_lower(x: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> bool:
    """See lower.py. False, with nothing written, for more columns, types or strides than the kernel takes."""
    return _start(x, rows, low, joined, is_gated=False)


def _start(x: Tensor, rows: Tensor, low: Tensor, joined: Tensor, *, is_gated: bool) -> bool:
    operands, (columns, width) = (x, rows, low, joined), rows.shape
    if columns > LARGEST_LOWERED or not launching.accepts(*operands) or not launching.same_type(operands):
        return False
    if x.element_size() != 2 or not rows.is_contiguous():
        return False
    unit = launching.unit_of(x, low, joined)
    launching.start(
        _lower, triton.cdiv(len(x), ROWS), x, rows, low, joined,
        *[t.stride(0) // unit for t in (x, low, joined)], len(x), UNIT=unit, WIDTH=width, COLUMNS=columns,
        BLOCK=max(16, launching.power_of_two(columns)), TILE=TILE, ROWS=ROWS, IS_GATED=is_gated,
        IS_OPAQUE=not launching.is_interpreted(), num_warps=4, num_stages=3,
    )  # fmt: skip
    return True
