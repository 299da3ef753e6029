"""Norms of heads (Qwen 3) and rotary embedding (Su et al. 2021, in the half-split form of transformers) in one pass.

    x (T, (Hq + Hk) D): query heads, then key heads, as columns of the product that made them

Legend: T tokens, Hq query heads, Hk key heads, D head dimension, R rotated dimensions of a head (R <= D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import _normalized
from .registry import register, wide


def _head_weights(q_weight: Tensor, k_weight: Tensor, num_q: int, num_heads: int) -> Tensor:
    """(Hq + Hk, D)."""
    return torch.cat([q_weight.expand(num_q, -1), k_weight.expand(num_heads - num_q, -1)])


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads, D) -> the same, turned by the angles of (T, R); `sin` negated turns back."""
    width = cos.shape[-1]
    half = width // 2
    first, second, rest = heads[..., :half], heads[..., half:width], heads[..., width:]
    c, s = wide(cos)[:, None], wide(sin)[:, None]
    turned = (
        first * c[..., :half] - second * s[..., :half],
        second * c[..., half:] + first * s[..., half:],
    )
    return torch.cat([*turned, rest], dim=-1)


def _rotate_heads(
    x: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    num_q: int,
    head_dim: int,
    out: Tensor,
) -> None:
    heads = wide(x).unflatten(-1, (-1, head_dim))
    if q_weight is not None and k_weight is not None:
        heads = _normalized(heads, eps)[0] * _head_weights(q_weight, k_weight, num_q, heads.shape[1])
    out.copy_(_rotated(heads, cos, sin).flatten(1))


def _rotate_heads_backward(
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
) -> None:
    grad = torch.cat([wide(grad_q), wide(grad_k)], dim=1)
    # the transpose of a rotation: the pair that shares an angle may have its two halves of the table
    half = cos.shape[-1] // 2
    swapped = torch.cat([sin[:, half:], sin[:, :half]], dim=-1)
    grad = _rotated(grad, cos, -swapped)
    if x is not None and q_weight is not None and k_weight is not None:
        normed, scale = _normalized(wide(x).unflatten(-1, (-1, grad.shape[-1])), eps)
        weighted = grad * _head_weights(q_weight, k_weight, grad_q.shape[1], grad.shape[1])
        grad = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    out.copy_(torch.cat([grad, wide(grad_v)], dim=1).flatten(1))


# cos, sin (T, R); weights (D,) or None for heads without norms. `out` (T, (Hq + Hk) D) may be `x` if there are none.
rotate_heads = register(
    "rotate_heads(Tensor x, Tensor? q_weight, Tensor? k_weight, float eps, Tensor cos, Tensor sin, int num_q, "
    "int head_dim, Tensor(a!) out) -> ()",
    _rotate_heads,
    "rotary_triton",
)

# Gradients (T, heads, D) of any strides over T and heads -> out (T, (Hq + Hk + Hv) D), gradient of the product's
# columns. `x` (T, (Hq + Hk) D) is the product's output, needed for norms only.
rotate_heads_backward = register(
    "rotate_heads_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? x, Tensor? q_weight, "
    "Tensor? k_weight, float eps, Tensor cos, Tensor sin, Tensor(a!) out) -> ()",
    _rotate_heads_backward,
    "rotary_triton",
)
