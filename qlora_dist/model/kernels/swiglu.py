"""SwiGLU (Shazeer 2020, eq. 6) on the joint output of gate and up, and its gradient in place.

Legend: T tokens, F inner width. Rows may be strided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import register, wide


def _halves(both: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return both[:, :width], both[:, width : 2 * width]


def _swiglu(both: Tensor, out: Tensor) -> None:
    gate, up = map(wide, _halves(both, out.shape[1]))
    out.copy_(torch.nn.functional.silu(gate) * up)


def _swiglu_backward(grad: Tensor, both: Tensor) -> None:
    views = _halves(both, grad.shape[1])
    (gate, up), grown = map(wide, views), wide(grad)
    gated = torch.sigmoid(gate)
    opened = gate * gated
    grad_gate = grown * up * (gated + opened * (1 - gated))
    grad_up = grown * opened
    grad.copy_(opened * up)
    views[0].copy_(grad_gate)
    views[1].copy_(grad_up)


# both (T, >= 2 F): gate, then up -> out (T, F) = silu(gate) * up
swiglu = register("swiglu(Tensor both, Tensor(a!) out) -> ()", _swiglu, "swiglu_triton")

# grad (T, F) of the result. Afterwards `both` holds the gradients of gate and up, and `grad` the result itself, which
# the caller needs for the gradient of the next layer's adapter and has not kept.
swiglu_backward = register("swiglu_backward(Tensor(a!) grad, Tensor(b!) both) -> ()", _swiglu_backward, "swiglu_triton")
