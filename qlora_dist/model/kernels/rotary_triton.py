"""Triton kernels of rotary.py: a program takes GROUP heads of one token, each as two halves that turn, and a rest.

The groups of a token are neighbours in the grid, so that its angles come from memory once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launching

GROUP = 8  # heads of a program
BACKWARD_STEPS = ["q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "x_step", "out_step", "cos_step",
                  "sin_step"]  # fmt: skip


@triton.jit
def _for_heads(table, columns, inside):
    """A row of `table` for every head of the program. Each thread loads the columns that it holds of a head, from the
    L1 cache after the first: distributing one copy over the threads would need shared memory and barriers."""
    at = tl.broadcast_to(columns[None, :], inside.shape)
    return tl.load(table + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weights(q_weight, k_weight, is_query, columns, inside):
    """The norm weights of each head's columns: one of two, the other is masked away."""
    of_query = _for_heads(q_weight, columns, inside & is_query[:, None])
    return of_query + _for_heads(k_weight, columns, inside & (is_query == 0)[:, None])


@triton.jit(do_not_specialize=["x_step", "out_step", "cos_step", "sin_step"])
def _rotate_heads(
    x, q_weight, k_weight, cos, sin, out, x_step, out_step, cos_step, sin_step, eps, UNIT: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    half: tl.constexpr = TURNED // 2
    token = (tl.program_id(0) // groups).to(tl.int64)
    head = tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    column, last = tl.arange(0, HALF), TURNED + tl.arange(0, REST)
    inside = (head < HEADS)[:, None] & (column < half)[None, :]
    behind = (head < HEADS)[:, None] & (last < DIM)[None, :]
    at = head[:, None] * DIM + column[None, :]
    at_last = head[:, None] * DIM + last[None, :]
    x += token * x_step * UNIT
    out += token * out_step * UNIT
    cos += token * cos_step * UNIT
    sin += token * sin_step * UNIT
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + half + at, mask=inside, other=0.0).to(tl.float32)
    if TURNED < DIM:
        rest = tl.load(x + at_last, mask=behind, other=0.0).to(tl.float32)
    if q_weight is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if TURNED < DIM:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        is_query = head < QUERIES
        first *= scale * _weights(q_weight, k_weight, is_query, column, inside)
        second *= scale * _weights(q_weight, k_weight, is_query, half + column, inside)
        if TURNED < DIM:
            rest *= scale * _weights(q_weight, k_weight, is_query, last, behind)
    cos_first = _for_heads(cos, column, inside)
    sin_first = _for_heads(sin, column, inside)
    cos_second = _for_heads(cos, half + column, inside)
    sin_second = _for_heads(sin, half + column, inside)
    kind = out.dtype.element_ty
    tl.store(out + at, (first * cos_first - second * sin_first).to(kind), mask=inside)
    tl.store(out + half + at, (second * cos_second + first * sin_second).to(kind), mask=inside)
    if TURNED < DIM:
        tl.store(out + at_last, rest.to(kind), mask=behind)


@triton.jit(do_not_specialize=BACKWARD_STEPS)
def _rotate_heads_backward(
    grad_q, grad_k, grad_v, x, q_weight, k_weight, cos, sin, out,
    q_token, q_head, k_token, k_head, v_token, v_head, x_step, out_step, cos_step, sin_step, eps, UNIT: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, DIM: tl.constexpr, TURNED: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # groups of query heads, then of key heads, then of value heads: none has heads of two kinds
    q_groups: tl.constexpr = (QUERIES + GROUP - 1) // GROUP
    k_groups: tl.constexpr = (KEYS + GROUP - 1) // GROUP
    groups: tl.constexpr = q_groups + k_groups + (VALUES + GROUP - 1) // GROUP
    half: tl.constexpr = TURNED // 2
    token = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    is_value = group >= q_groups + k_groups
    if group < q_groups:
        grad, grad_step, grad_head = grad_q, q_token, q_head
    elif is_value:
        grad, grad_step, grad_head = grad_v, v_token, v_head
    else:
        grad, grad_step, grad_head = grad_k, k_token, k_head
    before = tl.where(is_value, QUERIES + KEYS, tl.where(group < q_groups, 0, QUERIES))
    number = tl.where(is_value, VALUES, tl.where(group < q_groups, QUERIES, KEYS))
    group -= tl.where(is_value, q_groups + k_groups, tl.where(group < q_groups, 0, q_groups))
    head = group * GROUP + tl.arange(0, GROUP)
    column, last = tl.arange(0, HALF), TURNED + tl.arange(0, REST)
    inside = (head < number)[:, None] & (column < half)[None, :]
    behind = (head < number)[:, None] & (last < DIM)[None, :]
    grad += token * grad_step * UNIT
    grad_at = head.to(tl.int64)[:, None] * grad_head * UNIT
    first = tl.load(grad + grad_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(grad + half + grad_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if TURNED < DIM:
        rest = tl.load(grad + grad_at + last[None, :], mask=behind, other=0.0).to(tl.float32)
    at = (before + head)[:, None] * DIM + column[None, :]
    at_last = (before + head)[:, None] * DIM + last[None, :]
    out += token * out_step * UNIT
    if not is_value:
        cos += token * cos_step * UNIT
        sin += token * sin_step * UNIT
        cos_first = _for_heads(cos, column, inside)
        sin_first = _for_heads(sin, column, inside)
        cos_second = _for_heads(cos, half + column, inside)
        sin_second = _for_heads(sin, half + column, inside)
        turned = first * cos_first + second * sin_second
        second = second * cos_second - first * sin_first
        first = turned
        if x is not None:
            x += token * x_step * UNIT
            is_query = before + head < QUERIES
            first *= _weights(q_weight, k_weight, is_query, column, inside)
            second *= _weights(q_weight, k_weight, is_query, half + column, inside)
            x_first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            x_second = tl.load(x + half + at, mask=inside, other=0.0).to(tl.float32)
            squares = tl.sum(x_first * x_first, 1) + tl.sum(x_second * x_second, 1)
            products = tl.sum(first * x_first, 1) + tl.sum(second * x_second, 1)
            if TURNED < DIM:
                rest *= _weights(q_weight, k_weight, is_query, last, behind)
                x_rest = tl.load(x + at_last, mask=behind, other=0.0).to(tl.float32)
                squares += tl.sum(x_rest * x_rest, 1)
                products += tl.sum(rest * x_rest, 1)
            scale = tl.rsqrt(squares / DIM + eps)
            mean = (products * scale / DIM * scale)[:, None]
            scale = scale[:, None]
            first = scale * (first - x_first * mean)
            second = scale * (second - x_second * mean)
            if TURNED < DIM:
                rest = scale * (rest - x_rest * mean)
    kind = out.dtype.element_ty
    tl.store(out + at, first.to(kind), mask=inside)
    tl.store(out + half + at, second.to(kind), mask=inside)
    if TURNED < DIM:
        tl.store(out + at_last, rest.to(kind), mask=behind)


def rotate_heads(
    x: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    num_q: int,
    head_dim: int,
    out: Tensor,
) -> bool:
    """See rotary.py. False, with nothing written, for types or strides that the kernel does not take."""
    if not launching.accepts(x, q_weight, k_weight, cos, sin, out):
        return False
    if q_weight is None or k_weight is None:
        q_weight = k_weight = None
    heads, unit = x.shape[1] // head_dim, launching.unit_of(x, cos, sin, out)
    steps = [t.stride(0) // unit for t in (x, out, cos, sin)]
    launching.start(
        _rotate_heads, len(x) * triton.cdiv(heads, GROUP), x, q_weight, k_weight, cos, sin, out, *steps, eps,
        UNIT=unit, QUERIES=num_q, HEADS=heads, **_tile(head_dim, cos.shape[1]),
    )  # fmt: skip
    return True


def rotate_heads_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    x: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
) -> bool:
    """See rotary.py. False, with nothing written, for types or strides that the kernel does not take."""
    grads = (grad_q, grad_k, grad_v)
    if not launching.accepts(*grads, x, q_weight, k_weight, cos, sin, out) or not launching.same_type(grads):
        return False
    if x is None or q_weight is None or k_weight is None:
        x = q_weight = k_weight = None
    unit = launching.unit_of(*grads, x, cos, sin, out)
    steps = [step // unit for grad in grads for step in grad.stride()[:2]]
    steps += [0 if t is None else t.stride(0) // unit for t in (x, out, cos, sin)]
    numbers = [grad.shape[1] for grad in grads]
    groups = sum(triton.cdiv(number, GROUP) for number in numbers)
    launching.start(
        _rotate_heads_backward, len(out) * groups, *grads, x, q_weight, k_weight, cos, sin, out, *steps, eps,
        UNIT=unit, QUERIES=numbers[0], KEYS=numbers[1], VALUES=numbers[2], **_tile(grad_q.shape[2], cos.shape[1]),
    )  # fmt: skip
    return True


def _tile(dim: int, turned: int) -> dict[str, int]:
    half = launching.power_of_two(max(1, turned // 2))
    return {
        "DIM": dim,
        "TURNED": turned,
        "GROUP": GROUP,
        "HALF": half,
        "REST": launching.power_of_two(max(1, dim - turned)),
        # a thread holds 16 bytes of each half
        "num_warps": launching.warps_for(GROUP * half, 8),
    }
