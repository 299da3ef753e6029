"""The low-rank update of one layer, y + scale * B(A x), arranged so that a recomputed layer can stop early.

torch's non-reentrant checkpoint reruns a layer in the backward pass only until every saved tensor exists again. In
`torch.addmm(base(x), low, B.t())` `low` is saved after the base's product, so the last linear layer of a decoder layer
(down_proj, more than a quarter of its weights) would be dequantized and multiplied again, for an output that is not
needed. Here everything that the backward pass needs is saved before the base's product:

    _Update   x, A, B -> low = A x, and a token that represents the update in the graph   (saves x, low, A, B)
    base      x -> y                                                                      (a frozen product)
    _Add      y, token -> y + scale * low B^T                                             (saves nothing)

Legend: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def lowrank_forward(
    base: Callable[[Tensor], Tensor],
    x: Tensor,  # (..., I)
    updates: list[tuple[Tensor, Tensor, Tensor, float]],
) -> Tensor:
    """base(x) + the sum of scale * B(A(dropped)), (..., O), in the dtype of x.

    An update is (dropped, A, B, scale): the input after dropout (..., I), fp32 masters A (r, I) and B (O, r). The
    masters are cast to the dtype of the input; their gradients are computed in that dtype and cast back up.
    """
    prepared = [(*_Update.apply(dropped, a, b, scale), b, scale) for dropped, a, b, scale in updates]
    y = base(x)
    for token, low, b, scale in prepared:
        y = _Add.apply(y, token, low, b, scale)
    return y


class _Update(torch.autograd.Function):
    """The graph node of the whole update: it receives y's gradient, since y is a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        low = torch.nn.functional.linear(x, a.to(x.dtype))  # (..., r)
        # the masters are saved, not their casts: saving parameters is free, casts in all layers are not
        ctx.save_for_backward(x, low, a, b)
        ctx.mark_non_differentiable(low)
        ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for `low` in every backward pass
        ctx.scale = scale
        token = x.new_empty(()).expand(*x.shape[:-1], b.shape[0])  # y's shape without y's memory
        return token, low

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        dtype = x.dtype
        grad = grads[0].reshape(-1, b.shape[0])  # (T, O)
        grad_b = (torch.mm(grad.t(), low.reshape(-1, low.shape[-1])) * ctx.scale).to(b.dtype) if needs_b else None
        grad_low = torch.mm(grad, b.to(dtype)) * ctx.scale  # (T, r)
        grad_a = torch.mm(grad_low.t(), x.reshape(-1, x.shape[-1])).to(a.dtype) if needs_a else None
        grad_x = torch.mm(grad_low, a.to(dtype)).view(x.shape) if needs_x else None
        return grad_x, grad_a, grad_b, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
        flat, low, b = y.view(-1, y.shape[-1]), low.reshape(-1, low.shape[-1]), b.to(y.dtype).t()
        if y._is_view():  # some layers with a bias return one; autograd refuses to modify a view made by a Function
            return torch.addmm(flat, low, b, alpha=scale).view(y.shape)
        flat.addmm_(low, b, alpha=scale)  # in place: the base's output is new and not saved for the backward pass
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs_y, needs_token = ctx.needs_input_grad[:2]
        return grads[0] if needs_y else None, grads[0] if needs_token else None, None, None, None
