"""Triton kernels of adapters.py: one launch for up to MOST adapters, each with its own pointer."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launching

MOST = 3  # query, key and value share their input
A_BLOCK = 2048  # columns of a program
B_TILE = 2048  # elements of a program


@triton.jit(do_not_specialize=["step0", "step1", "step2", "out_step"])
def _write_a(
    a0, a1, a2, out, step0, step1, step2, out_step,
    UNIT: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, END2: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pieces: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    # one of them is not masked away; beyond the last row all are, which leaves zeros
    value = tl.load(a0 + row * step0 * UNIT + columns, mask=inside & (row < END0), other=0.0)
    if a1 is not None:
        at = a1 + (row - END0) * step1 * UNIT + columns
        value += tl.load(at, mask=inside & (row >= END0) & (row < END1), other=0.0)
    if a2 is not None:
        at = a2 + (row - END1) * step2 * UNIT + columns
        value += tl.load(at, mask=inside & (row >= END1) & (row < END2), other=0.0)
    tl.store(out + row * out_step * UNIT + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scaled_part(
    b, step, scale, row, column, number, UNIT: tl.constexpr, START: tl.constexpr, END: tl.constexpr
):  # fmt: skip
    inside = ((row >= 0) & (row < number))[:, None] & ((column >= START) & (column < END))[None, :]
    at = row[:, None] * step * UNIT + (column - START)[None, :]
    return tl.load(b + at, mask=inside, other=0.0).to(tl.float32) * scale


@triton.jit(do_not_specialize=[
    "step0", "step1", "step2", "out_step", "first0", "first1", "first2", "number0", "number1", "number2", "rows",
])  # fmt: skip
def _write_b(
    b0, b1, b2, out, step0, step1, step2, out_step, first0, first1, first2, number0, number1, number2, rows, scale,
    UNIT: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, END2: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    value = _scaled_part(b0, step0, scale, row - first0, column, number0, UNIT, 0, END0)
    if b1 is not None:
        value += _scaled_part(b1, step1, scale, row - first1, column, number1, UNIT, END0, END1)
    if b2 is not None:
        value += _scaled_part(b2, step2, scale, row - first2, column, number2, UNIT, END1, END2)
    at = out + row[:, None] * out_step * UNIT + column[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < WIDTH)[None, :])


def write_a(adapters: list[Tensor], out: Tensor) -> bool:
    """See adapters.py. False, with nothing written, for more adapters, types or strides than the kernel takes."""
    if not _fit(adapters, out):
        return False
    unit, width = launching.unit_of(*adapters, out), out.shape[1]
    block = min(A_BLOCK, launching.power_of_two(width))
    launching.start(
        _write_a, len(out) * triton.cdiv(width, block), *_three(adapters, None), out,
        *_three([a.stride(0) // unit for a in adapters], 0), out.stride(0) // unit,
        UNIT=unit, **_ends([len(a) for a in adapters]), WIDTH=width, BLOCK=block,
        num_warps=launching.warps_for(block),
    )  # fmt: skip
    return True


def write_b(adapters: list[Tensor], first_rows: list[int], scale: float, out: Tensor) -> bool:
    """See adapters.py. False, with nothing written, for more adapters, types or strides than the kernel takes."""
    if not _fit(adapters, out):
        return False
    unit, width = launching.unit_of(*adapters, out), out.shape[1]
    block = launching.power_of_two(width)
    rows = max(1, B_TILE // block)
    launching.start(
        _write_b, triton.cdiv(len(out), rows), *_three(adapters, None), out,
        *_three([b.stride(0) // unit for b in adapters], 0), out.stride(0) // unit, *_three(first_rows, 0),
        *_three([len(b) for b in adapters], 0), len(out), scale,
        UNIT=unit, **_ends([b.shape[1] for b in adapters]), WIDTH=width, ROWS=rows, BLOCK=block,
        num_warps=launching.warps_for(rows * block),
    )  # fmt: skip
    return True


def _fit(adapters: list[Tensor], out: Tensor) -> bool:
    return 1 <= len(adapters) <= MOST and launching.accepts(*adapters, out) and launching.same_type(adapters)


def _three(values: list, other: object) -> list:
    return [*values, *[other] * (MOST - len(values))]


def _ends(sizes: list[int]) -> dict[str, int]:
    """Where the part of each adapter ends."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return {f"END{i}": end for i, end in enumerate(_three(ends, ends[-1]))}
