"""Triton kernels of lower.py: a program takes ROWS tokens and walks along their columns, the next ones on their way."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...config.joint_products import LARGEST_LOWERED
from . import launching
from .gradients_triton import _once

ROWS, TILE = 32, 128  # tokens of a program, columns that it takes at a time
NORM_ROWS, NORM_TILE = 16, 256  # of `_norm_lower`
# Rows of all its programs at a time: the second pass finds them in the L2 cache (40 MB on an A100, 50 on an H100)
NORM_CACHED_BYTES = 2**25
NORM_LEAST_PROGRAMS = 128


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


@triton.jit(do_not_specialize=["x_step", "low_step", "joined_step", "tokens", "blocks"])
def _norm_lower(
    x, weight, rows, scales, low, joined, x_step, low_step, joined_step, tokens, blocks, eps, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    IS_OPAQUE: tl.constexpr,
):  # fmt: skip
    """A program takes every n-th block of rows: their statistics, then the rows again, from the end read last."""
    k = tl.arange(0, BLOCK)
    kind: tl.constexpr = joined.dtype.element_ty
    last: tl.constexpr = (WIDTH + TILE - 1) // TILE * TILE - TILE
    program = tl.program_id(0).to(tl.int64)
    for number in range(blocks):
        row = (program + number * tl.num_programs(0)) * ROWS + tl.arange(0, ROWS)
        inside_row = (row < tokens)[:, None]
        x_rows = x + row[:, None] * x_step * UNIT
        joined_rows = joined + row[:, None] * joined_step * UNIT
        squares = tl.zeros((ROWS, 2 * TILE), tl.float32)  # nothing is on its way meanwhile: more at a time
        for start in range(0, WIDTH, 2 * TILE):
            column = start + tl.arange(0, 2 * TILE)
            inside = inside_row & (column < WIDTH)[None, :]
            value = tl.load(x_rows + column[None, :], mask=inside, other=0.0).to(tl.float32)
            squares += value * value
        scale = tl.rsqrt(tl.sum(squares, 1) / WIDTH + eps)
        tl.store(scales + row, scale, mask=row < tokens)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for done in range(0, WIDTH, TILE):
            column = last - done + tl.arange(0, TILE)
            inside_column = column < WIDTH
            inside = inside_row & inside_column[None, :]
            value = tl.load(x_rows + column[None, :], mask=inside, other=0.0).to(tl.float32) * scale[:, None]
            value *= tl.load(weight + column, mask=inside_column, other=0.0).to(tl.float32)[None, :]
            value = _once(value.to(kind), IS_OPAQUE)
            tl.store(joined_rows + column[None, :], value, mask=inside)
            inside = (k < COLUMNS)[:, None] & inside_column[None, :]
            a = tl.load(rows + k[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
            total = tl.dot(value, tl.trans(a), total, input_precision="ieee")
        inside = inside_row & (k < COLUMNS)[None, :]
        tl.store(low + row[:, None] * low_step * UNIT + k[None, :], total.to(kind), mask=inside)
        tl.store(joined_rows + WIDTH + k[None, :], total.to(kind), mask=inside)


def swiglu_lower(both: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> bool:
    """See lower.py. False, with nothing written, for more columns, types or strides than the kernel takes."""
    return _start(both, rows, low, joined, is_gated=True)


def copy_lower(x: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> bool:
    """See lower.py. False, with nothing written, for more columns, types or strides than the kernel takes."""
    return _start(x, rows, low, joined, is_gated=False)


def norm_lower(
    x: Tensor, weight: Tensor, eps: float, rows: Tensor, scales: Tensor, low: Tensor, joined: Tensor
) -> bool:
    """See lower.py. False, with nothing written, for more columns, types or strides than the kernel takes."""
    columns, width = rows.shape
    if not _fit(x, rows, low, joined) or not launching.accepts(weight, scales):
        return False
    unit = launching.unit_of(x, low, joined)
    blocks = triton.cdiv(len(x), NORM_ROWS)
    most = max(NORM_LEAST_PROGRAMS, NORM_CACHED_BYTES // (NORM_ROWS * width * x.element_size()))
    launching.start(
        _norm_lower, min(most, blocks), x, weight, rows, scales, low, joined,
        *[t.stride(0) // unit for t in (x, low, joined)], len(x), triton.cdiv(blocks, most), eps,
        UNIT=unit, WIDTH=width, COLUMNS=columns, BLOCK=max(16, launching.power_of_two(columns)), TILE=NORM_TILE,
        ROWS=NORM_ROWS, IS_OPAQUE=not launching.is_interpreted(), num_warps=4, num_stages=3,
    )  # fmt: skip
    return True


def _fit(x: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> bool:
    operands = (x, rows, low, joined)
    return (
        len(rows) <= LARGEST_LOWERED
        and launching.accepts(*operands)
        and launching.same_type(operands)
        and x.element_size() == 2
        and rows.is_contiguous()
    )


def _start(x: Tensor, rows: Tensor, low: Tensor, joined: Tensor, *, is_gated: bool) -> bool:
    columns, width = rows.shape
    if not _fit(x, rows, low, joined):
        return False
    unit = launching.unit_of(x, low, joined)
    launching.start(
        _lower, triton.cdiv(len(x), ROWS), x, rows, low, joined,
        *[t.stride(0) // unit for t in (x, low, joined)], len(x), UNIT=unit, WIDTH=width, COLUMNS=columns,
        BLOCK=max(16, launching.power_of_two(columns)), TILE=TILE, ROWS=ROWS, IS_GATED=is_gated,
        IS_OPAQUE=not launching.is_interpreted(), num_warps=4, num_stages=3,
    )  # fmt: skip
    return True
