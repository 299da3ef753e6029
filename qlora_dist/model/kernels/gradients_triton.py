"""Triton kernels of gradients.py.

A program takes COLUMNS_OF_PART columns in four tiles, and walks down its part of the tokens: sums over tokens stay in
registers until its end, sums over its columns are complete after each step. Values are rounded to the operands' type
before they are multiplied, as the plain products round them; sums are fp32. The next step's tiles are on their way
(cp.async) while one is computed: a program has 48 KiB in flight.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...config.joint_products import COLUMNS_OF_PART, COLUMNS_OF_RAISED, LARGEST_JOINT_RANK, ROWS_OF_STEP
from . import launching

MOST = 3  # adapters of one product
SUM_ROWS = 16  # tokens of a program of `_sum_parts`
SUM_PARTS = 8  # parts that it adds at a time


@triton.jit
def _once(value, IS_OPAQUE: tl.constexpr):
    """The same value. The compiler would compute it anew for each product, in each product's layout of threads."""
    if IS_OPAQUE:
        pack: tl.constexpr = 32 // value.dtype.primitive_bitwidth
        value = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=pack
        )  # fmt: skip
    return value


@triton.jit
def _gate_tile(
    grad, gate, b, column, row, inside_row, k, inside_k, raised, low_gate, low_up, raised_gate, raised_up,
    of_a, of_gate, of_up, grad_step, both_step, UNIT: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
    IS_OPAQUE: tl.constexpr,
):  # fmt: skip
    """One tile: writes the gradients of gate and up; adds to the five sums."""
    inside = (column < WIDTH)[:, None] & inside_row[None, :]
    at = column[:, None] + row[None, :] * both_step * UNIT
    gate_value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    up_value = tl.load(gate + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    grown = tl.load(grad + column[:, None] + row[None, :] * grad_step * UNIT, mask=inside, other=0.0).to(tl.float32)
    kind: tl.constexpr = gate.dtype.element_ty
    gated = tl.sigmoid(gate_value)
    opened = gate_value * gated
    grad_gate = _once((grown * up_value * (gated + opened * (1 - gated))).to(kind), IS_OPAQUE)
    grad_up = _once((grown * opened).to(kind), IS_OPAQUE)
    result = _once((opened * up_value).to(kind), IS_OPAQUE)
    tl.store(gate + at, grad_gate, mask=inside)
    tl.store(gate + WIDTH + at, grad_up, mask=inside)
    of_a = tl.dot(result, raised, of_a, input_precision="ieee")
    of_gate = tl.dot(grad_gate, low_gate, of_gate, input_precision="ieee")
    of_up = tl.dot(grad_up, low_up, of_up, input_precision="ieee")
    inside_b = (column < WIDTH)[:, None] & inside_k[None, :]
    at_b = b + column[:, None] * RANK + k[None, :]
    b_gate = tl.load(at_b, mask=inside_b, other=0.0)
    raised_gate = tl.dot(tl.trans(grad_gate), b_gate, raised_gate, input_precision="ieee")
    b_up = tl.load(at_b + WIDTH * RANK, mask=inside_b, other=0.0)
    raised_up = tl.dot(tl.trans(grad_up), b_up, raised_up, input_precision="ieee")
    return raised_gate, raised_up, of_a, of_gate, of_up


@triton.jit
def _store_sums(
    out, column, k, inside_k, of_a, of_gate, of_up, scale, WIDTH: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    inside = inside_k[:, None] & (column < WIDTH)[None, :]
    tl.store(out + k[:, None] * WIDTH + column[None, :], tl.trans(of_a), mask=inside)
    out += RANK * WIDTH
    at = column[:, None] * RANK + k[None, :]
    inside = (column < WIDTH)[:, None] & inside_k[None, :]
    tl.store(out + at, of_gate * scale, mask=inside)
    tl.store(out + WIDTH * RANK + at, of_up * scale, mask=inside)


@triton.jit(do_not_specialize=["grad_step", "raised_step", "low_step", "both_step", "tokens", "steps"])
def _swiglu_backward_products(
    grad, raised, low, b, scale, both, of_rows, of_columns, grad_step, raised_step, low_step, both_step, tokens, steps,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, IS_OPAQUE: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = (WIDTH + 4 * TILE - 1) // (4 * TILE)
    part = tl.program_id(0) % parts
    first = (tl.program_id(0) // parts).to(tl.int64) * steps * ROWS
    k = tl.arange(0, BLOCK)
    inside_k = k < RANK
    column = part * 4 * TILE + tl.arange(0, TILE)
    a0 = tl.zeros((TILE, BLOCK), tl.float32)
    a1, a2, a3, g0, g1, g2, g3, u0, u1, u2, u3 = a0, a0, a0, a0, a0, a0, a0, a0, a0, a0, a0
    of_rows += part.to(tl.int64) * tokens * RANK
    for step in range(steps):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside_row = row < tokens
        inside = inside_row[:, None] & inside_k[None, :]
        to = row[:, None] * low_step * UNIT + k[None, :]
        low_gate = tl.load(low + to, mask=inside, other=0.0)
        low_up = tl.load(low + RANK + to, mask=inside, other=0.0)
        of_last = tl.load(raised + row[:, None] * raised_step * UNIT + k[None, :], mask=inside, other=0.0)
        gate = tl.zeros((ROWS, BLOCK), tl.float32)
        up = gate
        gate, up, a0, g0, u0 = _gate_tile(
            grad, both, b, column, row, inside_row, k, inside_k, of_last, low_gate, low_up, gate, up,
            a0, g0, u0, grad_step, both_step, UNIT, WIDTH, RANK, IS_OPAQUE,
        )  # fmt: skip
        gate, up, a1, g1, u1 = _gate_tile(
            grad, both, b, column + TILE, row, inside_row, k, inside_k, of_last, low_gate, low_up, gate, up,
            a1, g1, u1, grad_step, both_step, UNIT, WIDTH, RANK, IS_OPAQUE,
        )  # fmt: skip
        gate, up, a2, g2, u2 = _gate_tile(
            grad, both, b, column + 2 * TILE, row, inside_row, k, inside_k, of_last, low_gate, low_up, gate, up,
            a2, g2, u2, grad_step, both_step, UNIT, WIDTH, RANK, IS_OPAQUE,
        )  # fmt: skip
        gate, up, a3, g3, u3 = _gate_tile(
            grad, both, b, column + 3 * TILE, row, inside_row, k, inside_k, of_last, low_gate, low_up, gate, up,
            a3, g3, u3, grad_step, both_step, UNIT, WIDTH, RANK, IS_OPAQUE,
        )  # fmt: skip
        # both at once: 16 bytes a thread
        inside = inside_row[None, :, None] & inside_k[None, None, :]
        to = tl.arange(0, 2)[:, None, None].to(tl.int64) * parts * tokens * RANK
        to += row[None, :, None] * RANK + k[None, None, :]
        tl.store(of_rows + to, tl.permute(tl.join(gate, up), (2, 0, 1)) * scale, mask=inside)
    of_columns += (tl.program_id(0) // parts).to(tl.int64) * 3 * WIDTH * RANK
    _store_sums(of_columns, column, k, inside_k, a0, g0, u0, scale, WIDTH, RANK)
    _store_sums(of_columns, column + TILE, k, inside_k, a1, g1, u1, scale, WIDTH, RANK)
    _store_sums(of_columns, column + 2 * TILE, k, inside_k, a2, g2, u2, scale, WIDTH, RANK)
    _store_sums(of_columns, column + 3 * TILE, k, inside_k, a3, g3, u3, scale, WIDTH, RANK)


@triton.jit
def _raised_tile(
    grad, column, end, row, inside_row, low, b, raised, of_b, step, UNIT: tl.constexpr, IS_OPAQUE: tl.constexpr
):  # fmt: skip
    inside = (column < end)[:, None] & inside_row[None, :]
    value = tl.load(grad + column[:, None] + row[None, :] * step * UNIT, mask=inside, other=0.0)
    value = _once(value, IS_OPAQUE)
    of_b = tl.dot(value, low, of_b, input_precision="ieee")
    raised = tl.dot(tl.trans(value), b, raised, input_precision="ieee")
    return raised, of_b


@triton.jit
def _b_tile(b, column, end, k, inside_k, RANK: tl.constexpr):
    inside = (column < end)[:, None] & inside_k[None, :]
    return tl.load(b + column[:, None] * RANK + k[None, :], mask=inside, other=0.0)


@triton.jit
def _store_b(out, column, end, k, inside_k, of_b, scale, RANK: tl.constexpr):
    inside = (column < end)[:, None] & inside_k[None, :]
    tl.store(out + column[:, None] * RANK + k[None, :], of_b * scale, mask=inside)


@triton.jit(do_not_specialize=["grad_step", "low_step", "tokens", "steps"])
def _raised_products(
    grad, low, b, scale, of_rows, of_columns, grad_step, low_step, tokens, steps, UNIT: tl.constexpr,
    PARTS: tl.constexpr, PARTS0: tl.constexpr, PARTS1: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr,
    END2: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    IS_OPAQUE: tl.constexpr,
):  # fmt: skip
    """A program takes 4 TILE columns of one layer; PARTS0 and PARTS1: where the parts of the first layers end."""
    part = tl.program_id(0) % PARTS
    split = (tl.program_id(0) // PARTS).to(tl.int64)
    layer = (part >= PARTS0).to(tl.int32) + (part >= PARTS1).to(tl.int32)
    end = tl.where(layer == 0, END0, tl.where(layer == 1, END1, END2))
    start = tl.where(layer == 0, 0, tl.where(layer == 1, END0 - PARTS0 * 4 * TILE, END1 - PARTS1 * 4 * TILE))
    column = start + part * 4 * TILE + tl.arange(0, TILE)
    k = tl.arange(0, BLOCK)
    inside_k = k < RANK
    b0 = _b_tile(b, column, end, k, inside_k, RANK)
    b1 = _b_tile(b, column + TILE, end, k, inside_k, RANK)
    b2 = _b_tile(b, column + 2 * TILE, end, k, inside_k, RANK)
    b3 = _b_tile(b, column + 3 * TILE, end, k, inside_k, RANK)
    g0 = tl.zeros((TILE, BLOCK), tl.float32)
    g1, g2, g3 = g0, g0, g0
    low += layer * RANK
    of_rows += part.to(tl.int64) * tokens * RANK
    first = split * steps * ROWS
    for step in range(steps):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside_row = row < tokens
        inside = inside_row[:, None] & inside_k[None, :]
        own = tl.load(low + row[:, None] * low_step * UNIT + k[None, :], mask=inside, other=0.0)
        raised = tl.zeros((ROWS, BLOCK), tl.float32)
        raised, g0 = _raised_tile(grad, column, end, row, inside_row, own, b0, raised, g0, grad_step, UNIT, IS_OPAQUE)
        raised, g1 = _raised_tile(
            grad, column + TILE, end, row, inside_row, own, b1, raised, g1, grad_step, UNIT, IS_OPAQUE
        )
        raised, g2 = _raised_tile(
            grad, column + 2 * TILE, end, row, inside_row, own, b2, raised, g2, grad_step, UNIT, IS_OPAQUE
        )
        raised, g3 = _raised_tile(
            grad, column + 3 * TILE, end, row, inside_row, own, b3, raised, g3, grad_step, UNIT, IS_OPAQUE
        )
        tl.store(of_rows + row[:, None] * RANK + k[None, :], raised * scale, mask=inside)
    of_columns += split * END2 * RANK
    _store_b(of_columns, column, end, k, inside_k, g0, scale, RANK)
    _store_b(of_columns, column + TILE, end, k, inside_k, g1, scale, RANK)
    _store_b(of_columns, column + 2 * TILE, end, k, inside_k, g2, scale, RANK)
    _store_b(of_columns, column + 3 * TILE, end, k, inside_k, g3, scale, RANK)


@triton.jit(do_not_specialize=["tokens", "scaled_step", "out_step"])
def _sum_parts(
    parts, rows, scaled, out, tokens, scaled_step, out_step, UNIT: tl.constexpr, COUNT: tl.constexpr,
    END0: tl.constexpr, END1: tl.constexpr, END2: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    programs: tl.constexpr = COUNT + (1 if COUNT * RANK < WIDTH else 0)  # the last writes zeros
    adapter = tl.program_id(0) % programs
    row = (tl.program_id(0) // programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    part = tl.arange(0, AT_ONCE)
    start = tl.where(adapter == 0, 0, tl.where(adapter == 1, END0, END1))
    end = tl.where(adapter == 0, END0, tl.where(adapter == 1, END1, END2))
    if adapter == COUNT:
        start = end
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    at = row[None, :, None] * RANK + k[None, None, :]
    inside = (row < tokens)[None, :, None] & (k < RANK)[None, None, :]
    for first in range(start, end, AT_ONCE):
        place = (first + part).to(tl.int64)[:, None, None] * tokens * RANK + at
        some = tl.load(parts + place, mask=inside & (first + part < end)[:, None, None], other=0.0)
        total += tl.sum(some, 0)
    column = adapter * RANK + k
    # the block of the zeros may be wider than a rank
    limit = tl.where(adapter == COUNT, WIDTH, (adapter + 1) * RANK)
    inside_out = (row < tokens)[:, None] & (column < limit)[None, :]
    to = row[:, None] * out_step * UNIT + column[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside_out)
    if scaled is not None:  # noqa: SIM102
        if adapter < COUNT:
            total *= tl.load(rows + row, mask=row < tokens, other=0.0)[:, None]
            to = row[:, None] * scaled_step * UNIT + column[None, :]
            tl.store(scaled + to, total.to(scaled.dtype.element_ty), mask=inside_out)


def swiglu_backward_products(
    grad: Tensor,
    raised: Tensor,
    low: Tensor,
    b: Tensor,
    scale: float,
    both: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
) -> bool:
    """See gradients.py. False, with nothing written, for larger ranks, other parts than `num_parts`, and types or
    strides that the kernel does not take."""
    operands, rank, width = (grad, raised, low, b, both), b.shape[1], grad.shape[1]
    if rank > LARGEST_JOINT_RANK or not launching.accepts(*operands) or not launching.same_type(operands):
        return False
    parts = triton.cdiv(width, COLUMNS_OF_PART)
    if grad.element_size() != 2 or 2 * parts != len(of_rows) or not b.is_contiguous():
        return False  # tiles of fp32 do not fit in shared memory
    unit = launching.unit_of(grad, raised, low, both)
    steps = triton.cdiv(triton.cdiv(len(grad), ROWS_OF_STEP), len(of_columns))
    launching.start(
        _swiglu_backward_products, parts * len(of_columns), grad, raised, low, b, scale, both, of_rows, of_columns,
        *[t.stride(0) // unit for t in (grad, raised, low, both)], len(grad), steps,
        UNIT=unit, WIDTH=width, RANK=rank, BLOCK=max(16, launching.power_of_two(rank)),
        TILE=COLUMNS_OF_PART // 4, ROWS=ROWS_OF_STEP,
        IS_OPAQUE=not launching.is_interpreted(), num_warps=8,
        num_stages=2,
    )  # fmt: skip
    return True


def raised_products(
    grad: Tensor, low: Tensor, b: Tensor, ends: Sequence[int], scale: float, of_rows: Tensor, of_columns: Tensor
) -> bool:
    """See gradients.py. False, with nothing written, for more layers or larger ranks, other parts than `num_raised`,
    and types or strides that the kernel does not take."""
    operands, rank = (grad, low, b), b.shape[1]
    if rank > LARGEST_JOINT_RANK or len(ends) > MOST or not launching.accepts(*operands):
        return False
    widths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    parts = [sum(triton.cdiv(width, COLUMNS_OF_RAISED) for width in widths[: i + 1]) for i in range(len(ends))]
    if not launching.same_type(operands) or grad.element_size() != 2 or not b.is_contiguous():
        return False
    if parts[-1] != len(of_rows) or any(width % 8 for width in widths):
        return False
    unit = launching.unit_of(grad, low)
    steps = triton.cdiv(triton.cdiv(len(grad), ROWS_OF_STEP), len(of_columns))
    first, second, third = [*ends, *[ends[-1]] * (MOST - len(ends))]
    launching.start(
        _raised_products, parts[-1] * len(of_columns), grad, low, b, scale, of_rows, of_columns,
        grad.stride(0) // unit, low.stride(0) // unit, len(grad), steps, UNIT=unit, PARTS=parts[-1],
        PARTS0=parts[0], PARTS1=parts[min(1, len(parts) - 1)], END0=first, END1=second, END2=third, RANK=rank,
        BLOCK=max(16, launching.power_of_two(rank)), TILE=COLUMNS_OF_RAISED // 4, ROWS=ROWS_OF_STEP,
        IS_OPAQUE=not launching.is_interpreted(), num_warps=8, num_stages=2,
    )  # fmt: skip
    return True


def sum_parts(parts: Tensor, ends: Sequence[int], rows: Tensor | None, scaled: Tensor | None, out: Tensor) -> bool:
    """See gradients.py. False, with nothing written, for more adapters, types or strides than the kernel takes."""
    if len(ends) > MOST or not launching.accepts(parts, rows, scaled, out) or not parts.is_contiguous():
        return False
    rank, count, width = parts.shape[2], len(ends), out.shape[1]
    unit = launching.unit_of(scaled, out)
    programs = triton.cdiv(len(out), SUM_ROWS) * (count + (count * rank < width))
    block = launching.power_of_two(max(rank, width - count * rank))
    first, second, third = [*ends, *[ends[-1]] * (MOST - count)]
    launching.start(
        _sum_parts, programs, parts, rows, scaled, out, len(out),
        0 if scaled is None else scaled.stride(0) // unit, out.stride(0) // unit, UNIT=unit, COUNT=count,
        END0=first, END1=second, END2=third, RANK=rank, WIDTH=width, BLOCK=block, ROWS=SUM_ROWS, AT_ONCE=SUM_PARTS,
        num_warps=launching.warps_for(SUM_ROWS * block, 8),  # 16 bytes of the result a thread
    )  # fmt: skip
    return True
