"""Attention with sinks by a flash kernel that knows none: packed documents on CUDA.

A sink s is one more key, of every query, that absorbs probability and has no value. With L the kernel's log-sum-exp of
a query's scores, the sum of all with the sink is M = log(exp L + exp s), so

    out with sinks = out * exp(L - M)

exactly. The kernel's backward pass computes probabilities again as exp(score - L), and their gradients with the row
sums of grad * out: given M and the result with sinks in the places of L and out, it computes the gradients with
sinks. That of s is minus the sum over queries of exp(s - M) * (grad, out with sinks).

Nothing of this was run on a GPU: the formulas are tested with torch's flash kernel for CPUs, and `why_not` compares the
CUDA kernel on the device with the plain formula before it is used.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 0.03  # of values around 1 in bf16 and fp16, forward and backward


class FlashWithSinks(torch.autograd.Function):
    """(T, Hq, D) from q (T, Hq, D), k and v (T, Hkv, D), sinks (Hq,), and the documents' starts (N + 1,)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, starts: Tensor, longest: int, scale: float, left: int
    ) -> Tensor:
        """`left`: keys before a query's own that it sees; -1: all."""
        plain, lse = flash_forward(q, k, v, starts, longest, scale, left)
        total = torch.logaddexp(lse, sinks.float()[:, None])  # (Hq, T)
        out = plain * (lse - total).exp().t()[..., None].to(plain.dtype)
        ctx.save_for_backward(q, k, v, out, total, sinks, starts)
        ctx.longest, ctx.scale, ctx.left = longest, scale, left
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, sinks, starts = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            taken = (sinks.float()[:, None] - total).exp()  # each query's probability of the sink
            grad_sinks = -(taken * (grad.float() * out.float()).sum(-1).t()).sum(1).to(sinks.dtype)
        of_inputs = flash_backward(grad, q, k, v, out, total, starts, ctx.longest, ctx.scale, ctx.left)
        return *of_inputs, grad_sinks, None, None, None, None


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, left: int
) -> tuple[Tensor, Tensor]:
    """(out (T, Hq, D), log-sum-exp (Hq, T)). torch's own kernel, called as torch.nn.attention.varlen calls it."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, left < 0, False,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return out, lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, longest: int, scale: float,
    left: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    unused = torch.empty(0, device=q.device)
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is not
    of_q, of_k, of_v = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, starts, starts, longest, longest, 0.0, left < 0, random_state, unused,
        scale=scale, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    return of_q, of_k, of_v


def flash_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, starts: Tensor, longest: int, scale: float | None, left: int
) -> Tensor:
    """As `FlashWithSinks`; a scale of None is 1 / sqrt(D)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return FlashWithSinks.apply(q, k, v, sinks, starts, longest, scale, left)


@lru_cache(maxsize=8)
def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernel cannot be used here with sinks; empty if it gives what the plain formula gives, with gradients."""
    try:
        gap = largest_gap(device, dtype, head_dim)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"its result with attention sinks could not be checked here ({str(error).splitlines()[0][:100]})"
    return "" if gap <= TOLERANCE else f"its result with attention sinks is wrong here, by up to {gap:.3g}"


def largest_gap(device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Largest difference of results and gradients from plain math in fp32, of two documents, with a window and without;
    infinite if any is not finite."""
    lengths, heads, key_heads = (37, 91), 4, 2
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, head_dim) for count in (heads, key_heads, key_heads, heads)]
    *drawn, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    sinks = torch.linspace(-1, 2, heads, device=device, dtype=dtype)
    gaps = []
    for left in (-1, 15):
        found = []
        for is_plain in (False, True):
            inputs: Any = [
                one.detach().to(torch.float32 if is_plain else dtype).requires_grad_() for one in (*drawn, sinks)
            ]
            q, k, v, own = inputs
            if is_plain:
                out = plain_math(q, k, v, own, lengths, head_dim**-0.5, left)
            else:
                out = flash_with_sinks(q, k, v, own, starts, max(lengths), None, left)
            found.append([out, *torch.autograd.grad(out, inputs[:3], grad.to(out.dtype))])
        gaps += [float((one.float() - other).detach().abs().max()) for one, other in zip(*found, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)


def plain_math(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, lengths: tuple[int, ...], scale: float, left: int
) -> Tensor:
    """(T, Hq, D): the formula, one document after another."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for one in zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True):
        mine, keys, values = (tensor.transpose(0, 1) for tensor in one)
        keys, values = (tensor.repeat_interleave(groups, 0) for tensor in (keys, values))
        position = torch.arange(mine.shape[1], device=q.device)
        distance = position[:, None] - position
        is_seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        scores = (mine @ keys.mT * scale).masked_fill(~is_seen, -torch.inf)
        column = sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        outputs.append((torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ values).transpose(0, 1))
    return torch.cat(outputs)
