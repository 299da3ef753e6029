"""Adapters of layers that share their input, written as parts of one matrix, cast from the fp32 masters.

    [A1; A2; ...] (R, K)        the rows of all A
    s * diag(B1, B2, ...) (N, R)   each B in the rows of its layer's outputs and the columns of its own A

Legend: K inputs, N outputs of all layers together, R columns: all ranks together, rounded up.
"""

from __future__ import annotations

from torch import Tensor

from .registry import register


def _write_a(adapters: list[Tensor], out: Tensor) -> None:
    row = 0
    for a in adapters:
        out[row : row + len(a)].copy_(a)
        row += len(a)
    out[row:].zero_()


def _write_b(adapters: list[Tensor], first_rows: list[int], scale: float, out: Tensor) -> None:
    out.zero_()
    column = 0
    for b, first in zip(adapters, first_rows, strict=True):
        out[first : first + len(b), column : column + b.shape[1]].copy_(b * scale)
        column += b.shape[1]


# (r, K) each -> out (R, K); rows beyond the ranks become zero
write_a = register("write_a(Tensor[] adapters, Tensor(a!) out) -> ()", _write_a, "adapters_triton")

# (n, r) each, with the first of its rows -> out (N, R), zero elsewhere
write_b = register(
    "write_b(Tensor[] adapters, int[] first_rows, float scale, Tensor(a!) out) -> ()", _write_b, "adapters_triton"
)
