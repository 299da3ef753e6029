"""The gradient of SwiGLU in a decoder block, with those gradients of adapters that come from the same tensors.

Legend: T tokens, F inner width, r rank, R columns of the adapters of gate and up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.joint_products import LARGEST_JOINT_RANK, TOKENS_OF_CALL, num_parts
from .kernels import sum_parts, swiglu_backward_products
from .products import SharedInput, computes_jointly, is_fake


def is_joint(gate: SharedInput, down: SharedInput, like: Tensor) -> bool:
    """Whether `gate_gradients` computes them: gate, up and down have adapters of one rank that is not too large."""
    return (
        computes_jointly(like) and gate.rank is not None and gate.rank == down.rank and gate.rank <= LARGEST_JOINT_RANK
    )


def gate_gradients(
    gate: SharedInput, down: SharedInput, grad: Tensor, raised: Tensor, both: Tensor, low: Tensor, scales: Tensor
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor]:
    """dA of down, dB of gate and up, and G' with its rows times `scales` (T,).

    `both` (T, 2 F + R), gate and up, becomes [G | G'].

    `grad` (T, F) is the gradient of SwiGLU's result, `raised` (T, >= r) that of the last product's low, `low` (T, R)
    that of gate and up.
    """
    rank, width = down.rank, grad.shape[1]
    assert rank is not None
    b = gate.stacked_b(grad)
    kind = torch.float64 if grad.dtype == torch.float64 else torch.float32
    is_plain = grad.device.type == "cpu" and not is_fake(grad)  # the reference needs no parts
    step = len(grad) if is_plain else TOKENS_OF_CALL
    total: Tensor | None = None
    scaled = grad.new_empty(len(grad), 2 * rank)
    for start in range(0, len(grad), step):
        own = slice(start, start + step)
        tokens = len(grad[own])
        columns, rows = (1, 1) if is_plain else num_parts(tokens, width)
        of_rows = grad.new_empty(2 * columns, tokens, rank, dtype=kind)
        of_columns = grad.new_empty(rows, 3 * width * rank, dtype=kind)
        swiglu_backward_products(grad[own], raised[own], low[own], b, gate.scale, both[own], of_rows, of_columns)
        sum_parts(of_rows, [columns, 2 * columns], scales[own], scaled[own], both[own, 2 * width :])
        del of_rows
        summed = of_columns[0] if rows == 1 else of_columns.sum(0)
        total = summed if total is None else total.add_(summed)
    assert total is not None
    of_a = total[: rank * width].view(rank, width)
    of_b = total[rank * width :].view(2, width, rank)
    return (
        [of_a.to(down.adapters[0][0].dtype)],
        [part.to(b.dtype) for part, (_, b) in zip(of_b, gate.adapters, strict=True)],
        scaled,
    )
