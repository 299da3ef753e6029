"""The low-rank updates of a layer's experts: products of each expert's tokens with its own A and B.

One product after another, in the order of the experts: the reference, and exact on every device. An expert without a
token has no product, and the gradient of its part of A and B is zero: every rank has a gradient of every adapter.

Legend: S slots sorted by expert, E experts, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """What is added to one weight (E, O, I) of all experts: scale * B_e A_e, in PEFT's layout."""

    a: Tensor  # (E r, I): the experts' A one below the other
    b: Tensor  # (O, r E): column r E + e belongs to expert e
    scale: float

    def factors(self, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(A (E, r, I), B (E, O, r)), each expert's matrix in one piece."""
        b = _by_expert(self.b, num_experts)
        return self.a.to(dtype).view(num_experts, -1, self.a.shape[1]), b.new_empty(b.shape, dtype=dtype).copy_(b)


def _by_expert(b: Tensor, num_experts: int) -> Tensor:
    """(E, O, r), a view."""
    return b.view(len(b), -1, num_experts).permute(2, 0, 1)


def products(rows: Tensor, matrices: Tensor, counts: Sequence[int]) -> Tensor:
    """(S, m) from (S, n) sorted by expert and (E, n, m)."""
    result = rows.new_empty(len(rows), matrices.shape[2])
    for expert, own in _slots(counts):
        torch.mm(rows[own], matrices[expert], out=result[own])
    return result


def add_products(result: Tensor, rows: Tensor, matrices: Tensor, counts: Sequence[int], scale: float = 1.0) -> None:
    """Adds scale times `products` in place."""
    for expert, own in _slots(counts):
        result[own].addmm_(rows[own], matrices[expert], alpha=scale)


def gradients(
    update: Update, rows: Tensor, low: Tensor, grad: Tensor, grad_low: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(of A, of B), in their layout and type, from the inputs (S, I), A x (S, r), the gradient of the result (S, O)
    and that of A x (S, r), which contains the scale."""
    grad_a, grad_b = torch.zeros_like(update.a), torch.zeros_like(update.b)
    of_a, of_b = grad_a.view(len(counts), -1, rows.shape[1]), _by_expert(grad_b, len(counts))
    for expert, own in _slots(counts):
        of_a[expert] = torch.mm(grad_low[own].t(), rows[own])
        of_b[expert] = torch.mm(grad[own].t(), low[own]).mul_(update.scale)
    return grad_a, grad_b


def _slots(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its slots) of those that have any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count
