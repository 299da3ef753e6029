"""The input of a product together with its adapters' columns [X | low], low = X A^T, in one pass over X.

X is SwiGLU of gate and up, the norm of rows, or a copy: attention writes rows that are not wide enough. `low` is
written twice, because the buffer of the product is not kept for the backward pass.

Legend: T tokens, K inputs, R columns of all adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import _rms_norm
from .registry import register
from .swiglu import _swiglu


def _swiglu_lower(both: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> None:
    _swiglu(both, joined[:, : rows.shape[1]])
    _lower(rows, low, joined)


def _copy_lower(x: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> None:
    joined[:, : rows.shape[1]].copy_(x)
    _lower(rows, low, joined)


def _norm_lower(
    x: Tensor, weight: Tensor, eps: float, rows: Tensor, scales: Tensor, low: Tensor, joined: Tensor
) -> None:
    _rms_norm(x, weight, eps, scales, joined[:, : rows.shape[1]])
    _lower(rows, low, joined)


def _lower(rows: Tensor, low: Tensor, joined: Tensor) -> None:
    torch.mm(joined[:, : rows.shape[1]], rows.t(), out=low)
    joined[:, rows.shape[1] :].copy_(low)


# both (T, >= 2 K): gate, then up; rows (R, K) -> low (T, R), joined (T, K + R)
swiglu_lower = register(
    "swiglu_lower(Tensor both, Tensor rows, Tensor(a!) low, Tensor(b!) joined) -> ()", _swiglu_lower, "lower_triton"
)

# x (T, K)
copy_lower = register(
    "copy_lower(Tensor x, Tensor rows, Tensor(a!) low, Tensor(b!) joined) -> ()", _copy_lower, "lower_triton"
)

# x (T, K), weight (K,) -> the same, and scales (T,) in fp32: 1 / rms(x) of each row
norm_lower = register(
    "norm_lower(Tensor x, Tensor weight, float eps, Tensor rows, Tensor(a!) scales, Tensor(b!) low, "
    "Tensor(c!) joined) -> ()",
    _norm_lower,
    "lower_triton",
)
