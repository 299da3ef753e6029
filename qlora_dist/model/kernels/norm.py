"""RMSNorm (Zhang & Sennrich 2019, eq. 4) and its gradient, computed in fp32 and rounded once.

Legend: T tokens, H hidden. Rows may be strided (a view of a wider buffer), elements of a row are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register, wide


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), and 1 / rms(x) of each row."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


def _rms_norm(x: Tensor, weight: Tensor, eps: float, scales: Tensor | None, out: Tensor) -> None:
    normed, scale = _normalized(wide(x), eps)
    if scales is not None:
        scales.copy_(scale.squeeze(-1))
    out.copy_(normed * weight)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor
) -> None:
    normed, scale = _normalized(wide(x), eps)
    weighted = wide(grad) * weight
    result = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    out.copy_(result if residual is None else result + residual)


# (T, H), (H,) -> out (T, H), and `scales` (T,) in fp32: 1 / rms(x) of each row
rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? scales, Tensor(b!) out) -> ()", _rms_norm, "norm_triton"
)

# Gradient of the input; `residual` (T, H) is a second gradient of x, added. `out` may be `grad`.
rms_norm_backward = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, Tensor? residual, Tensor(a!) out) -> ()",
    _rms_norm_backward,
    "norm_triton",
)
