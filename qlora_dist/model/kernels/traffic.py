"""Bytes that one call of each operation moves between a GPU's memory and its kernel, for comparison with bandwidth.

Each element counts once: what several programs of a launch share (norm weights, angles, the table of codes) and what a
program reads again at once (rows of more than 16,384 columns, any of `norm_lower`) comes from a cache. With bf16, per
element of

    rms_norm                 x        reads 2, writes 2
    rms_norm_backward        x        reads 4, with a residual 6, writes 2
    rotate_heads             x        reads 2, writes 2
    rotate_heads_backward    out      reads 2, with norms 4 for queries and keys, writes 2
    swiglu                   out      reads 4, writes 2
    swiglu_backward          grad     reads 6, writes 6
    dequantize_4bit          out      reads 0.516 with double quantization, 0.5625 without, writes 2
    write_a, write_b         out      read the fp32 adapters, write 2
    swiglu_backward_products grad     reads 6, writes 4; and the operands of rank r once, and its parts in fp32
    swiglu_lower             joined   reads 4, writes 2; and A and low once
    copy_lower               joined   reads 2, writes 2; and A and low once
    norm_lower               x        reads 2, writes 2; and A, low and the scales once
    raised_products          grad     reads 2; and the operands of rank r once, and writes its parts in fp32
    sum_parts                parts    reads 4; writes the sum

Products inside of kernels count in `FLOPS`, though bytes bound all of these kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Traffic(NamedTuple):
    """Bytes of one call."""

    read: int
    written: int


def bytes_moved(name: str, arguments: Sequence[Any]) -> int:
    """Bytes read and written by a call of `qlora_dist::NAME`. Tensors may be fake. Raises KeyError for another name."""
    return sum(traffic(name, arguments))


def flops(name: str, arguments: Sequence[Any]) -> float:
    """Of the products inside of a call; 0 for operations without."""
    return FLOPS[name](*arguments) if name in FLOPS else 0.0


def traffic(name: str, arguments: Sequence[Any]) -> Traffic:
    """The two parts of `bytes_moved`."""
    return TRAFFIC[name](*arguments)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, scales: Tensor | None, out: Tensor) -> Traffic:
    return Traffic(_bytes(x, weight), _bytes(scales, out))


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor
) -> Traffic:
    return Traffic(_bytes(grad, x, weight, residual), _bytes(out))


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
) -> Traffic:
    return Traffic(_bytes(x, q_weight, k_weight, cos, sin), _bytes(out))


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
) -> Traffic:
    of_norms = 0 if q_weight is None else _bytes(x, q_weight, k_weight)
    return Traffic(_bytes(grad_q, grad_k, grad_v, cos, sin) + of_norms, _bytes(out))


def _swiglu(both: Tensor, out: Tensor) -> Traffic:
    return Traffic(2 * out.numel() * both.element_size(), _bytes(out))


def _swiglu_backward(grad: Tensor, both: Tensor) -> Traffic:
    moved = _bytes(grad) + 2 * grad.numel() * both.element_size()
    return Traffic(moved, moved)


def _dequantize_4bit(
    codes: Tensor,
    code: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
) -> Traffic:
    constants = _bytes(code, absmax, nested_absmax, nested_code, nested_offset)
    return Traffic(out.numel() // 2 + constants, _bytes(out))


def _write_a(adapters: list[Tensor], out: Tensor) -> Traffic:
    return Traffic(_bytes(*adapters), _bytes(out))


def _write_b(adapters: list[Tensor], first_rows: list[int], scale: float, out: Tensor) -> Traffic:
    return Traffic(_bytes(*adapters), _bytes(out))


def _swiglu_backward_products(
    grad: Tensor,
    raised: Tensor,
    low: Tensor,
    b: Tensor,
    scale: float,
    both: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
) -> Traffic:
    halves, rank = 2 * grad.numel() * both.element_size(), b.shape[1]
    thin = 3 * rank * len(grad) * low.element_size() + _bytes(b)
    return Traffic(_bytes(grad) + halves + thin, halves + _bytes(of_rows, of_columns))


def _sum_parts(parts: Tensor, ends: list[int], rows: Tensor | None, scaled: Tensor | None, out: Tensor) -> Traffic:
    return Traffic(_bytes(parts, rows), _bytes(scaled, out))


def _swiglu_lower(both: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> Traffic:
    read = 2 * len(both) * rows.shape[1] * both.element_size()
    return Traffic(read + _bytes(rows), _bytes(low, joined))


def _copy_lower(x: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> Traffic:
    return Traffic(_bytes(x, rows), _bytes(low, joined))


def _norm_lower(
    x: Tensor, weight: Tensor, eps: float, rows: Tensor, scales: Tensor, low: Tensor, joined: Tensor
) -> Traffic:
    return Traffic(_bytes(x, weight, rows), _bytes(scales, low, joined))


def _raised_products(
    grad: Tensor, low: Tensor, b: Tensor, ends: list[int], scale: float, of_rows: Tensor, of_columns: Tensor
) -> Traffic:
    of_low = b.shape[1] * len(ends) * len(low) * low.element_size()
    return Traffic(_bytes(grad, b) + of_low, _bytes(of_rows, of_columns))


def _flops_of_low(x: Tensor, rows: Tensor, low: Tensor, joined: Tensor) -> float:
    return 2.0 * len(x) * rows.numel()


TRAFFIC: dict[str, Callable[..., Traffic]] = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "rotate_heads": _rotate_heads,
    "rotate_heads_backward": _rotate_heads_backward,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "dequantize_4bit": _dequantize_4bit,
    "swiglu_backward_products": _swiglu_backward_products,
    "sum_parts": _sum_parts,
    "swiglu_lower": _swiglu_lower,
    "copy_lower": _copy_lower,
    "norm_lower": _norm_lower,
    "raised_products": _raised_products,
    "write_a": _write_a,
    "write_b": _write_b,
}

# dA, dB of gate and of up, G' of gate and of up: r columns each
FLOPS: dict[str, Callable[..., float]] = {
    "swiglu_backward_products": lambda grad, raised, low, b, *_: 10.0 * grad.numel() * b.shape[1],
    "swiglu_lower": _flops_of_low,
    "copy_lower": _flops_of_low,
    "norm_lower": lambda x, weight, eps, rows, *_: 2.0 * len(x) * rows.numel(),
    "raised_products": lambda grad, low, b, *_: 4.0 * grad.numel() * b.shape[1],
}
