"""SwiGLU's gradient with the four thin products of adapters that read the same tensors, in one pass over them.

    opened = silu(gate) * up, which the last product multiplied          (T, F)
    G      = the gradients of gate and up, from that of `opened`         (T, 2 F)
    dA     = D'^T opened, of the last product, D' its raised gradient    (r, F)
    dB     = s G^T low, of gate and of up, each with its own low         (2 F, r)
    G'     = s G B, of gate and of up, each with its own B               (T, 2 r)

Sums over columns (G') and over tokens (dA, dB) run across programs. Each program leaves its part, and a fixed order of
addition follows: `sum_parts` for G', a plain sum for dA and dB. No result depends on which program comes first.

Legend: T tokens, F inner width, r rank, s the adapters' scale, P parts of the columns, Q parts of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...config.joint_products import COLUMNS_OF_PART, COLUMNS_OF_RAISED, ROWS_OF_STEP
from .registry import register
from .swiglu import _swiglu_backward


def _ranges(length: int, parts: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, parts * size, size)]


def column_ranges(width: int, parts: int) -> list[slice]:
    """Of a kernel's parts, or all columns as one part."""
    return _ranges(width, parts, width if parts == 1 else COLUMNS_OF_PART)


def token_ranges(tokens: int, parts: int) -> list[slice]:
    """Of equal parts, in blocks of ROWS_OF_STEP."""
    return _ranges(tokens, parts, -(-max(1, -(-tokens // ROWS_OF_STEP)) // parts) * ROWS_OF_STEP)


def raised_ranges(ends: Sequence[int], parts: int) -> list[tuple[int, slice]]:
    """(layer, its columns) of a kernel's parts, or each layer's as one part."""
    starts = [0, *ends]
    widths = [end - start for start, end in zip(starts, ends, strict=False)]
    found = []
    for index, (start, width) in enumerate(zip(starts, widths, strict=False)):
        size = width if parts == len(ends) else COLUMNS_OF_RAISED
        found += [
            (index, slice(start + own.start, start + own.stop)) for own in _ranges(width, -(-width // size), size)
        ]
    return found


def _swiglu_backward_products(
    grad: Tensor,
    raised: Tensor,
    low: Tensor,
    b: Tensor,
    scale: float,
    both: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
) -> None:
    width, rank = grad.shape[1], b.shape[1]
    opened = grad.clone()
    _swiglu_backward(opened, both)
    num_columns = len(of_rows) // 2
    for half in range(2):
        for part, own in enumerate(column_ranges(width, num_columns)):
            own = slice(half * width + own.start, half * width + own.stop)
            of_rows[half * num_columns + part].copy_(torch.mm(both[:, own], b[own])).mul_(scale)
    for part, own in enumerate(token_ranges(len(grad), len(of_columns))):
        of_a, of_b = of_columns[part].split([rank * width, 2 * width * rank])
        of_a.view(rank, width).copy_(torch.mm(raised[own, :rank].t(), opened[own]))
        for half in range(2):
            columns = both[own, half * width : (half + 1) * width]
            product = torch.mm(columns.t(), low[own, half * rank : (half + 1) * rank])
            of_b.view(2, width, rank)[half].copy_(product).mul_(scale)


def _sum_parts(parts: Tensor, ends: Sequence[int], rows: Tensor | None, scaled: Tensor | None, out: Tensor) -> None:
    rank, start = parts.shape[2], 0
    out.zero_()
    for index, end in enumerate(ends):
        out[:, index * rank : (index + 1) * rank].copy_(parts[start:end].sum(0))
        if scaled is not None and rows is not None:
            scaled[:, index * rank : (index + 1) * rank].copy_(parts[start:end].sum(0) * rows[:, None])
        start = end


def _raised_products(
    grad: Tensor,
    low: Tensor,
    b: Tensor,
    ends: Sequence[int],
    scale: float,
    of_rows: Tensor,
    of_columns: Tensor,
) -> None:
    rank, parts = b.shape[1], raised_ranges(ends, len(of_rows))
    for part, (_, own) in enumerate(parts):
        of_rows[part].copy_(torch.mm(grad[:, own], b[own])).mul_(scale)
    for part, rows in enumerate(token_ranges(len(grad), len(of_columns))):
        for index, own in parts:
            columns = low[rows, index * rank : (index + 1) * rank]
            of_columns[part, own].copy_(torch.mm(grad[rows, own].t(), columns)).mul_(scale)


# grad (T, F), raised (T, >= r), low (T, >= 2 r), b (2 F, r), both (T, >= 2 F): gate and up, afterwards their gradients;
# parts in fp32: of_rows (2 P, T, r), gate's then up's; of_columns (Q, 3 F r): dA (r, F), then dB (2 F, r)
swiglu_backward_products = register(
    "swiglu_backward_products(Tensor grad, Tensor raised, Tensor low, Tensor b, float scale, Tensor(a!) both, "
    "Tensor(b!) of_rows, Tensor(c!) of_columns) -> ()",
    _swiglu_backward_products,
    "gradients_triton",
)

# What the adapters of layers with one input need of the gradients of their results, in one pass over these: G' = s G B,
# and dB = s G^T low. grad (T, N): of layers that end at the columns `ends`; low (T, >= r len(ends)), b (N, r); parts in
# fp32: of_rows (P, T, r), a layer's after those of the one before; of_columns (Q, N, r)
raised_products = register(
    "raised_products(Tensor grad, Tensor low, Tensor b, int[] ends, float scale, Tensor(a!) of_rows, "
    "Tensor(b!) of_columns) -> ()",
    _raised_products,
    "gradients_triton",
)

# parts (P, T, r) of all adapters, of which the i-th has those before ends[i] -> out (T, >= r len(ends)), the adapters
# side by side, zero behind them; `scaled` (T, r len(ends)): the same times `rows` (T,)
sum_parts = register(
    "sum_parts(Tensor parts, int[] ends, Tensor? rows, Tensor(a!)? scaled, Tensor(b!) out) -> ()",
    _sum_parts,
    "gradients_triton",
)
