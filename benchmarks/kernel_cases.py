"""Operands of each operation of qlora_dist.model.kernels as one decoder layer of a Llama shape calls it.

Rows are strided as in training: adapters add ADAPTER_COLUMNS columns to what a matrix is multiplied with.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_dist.config.joint_products import num_parts, num_raised

from .shapes import Shape

ADAPTER_COLUMNS = 64
RANK = 16
EPS = 1e-5


def operands(
    name: str, shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[Any]:
    """Arguments of one call, random on a real device, without memory on the meta device.

    Names: the operations, `rotate_heads` and its gradient also with `+norms` (Qwen 3), `dequantize_4bit` also with
    `+single` (without double quantization), `rms_norm` also with `+scales`, its gradient also with
    `+residual`.
    """
    return _MAKERS[name.partition("+")[0]](name.partition("+")[2], shape, tokens, _Maker(device, dtype))


# the file of an operation by its name's first word
_FILES = {
    "rms": "norm", "rotate": "rotary", "swiglu": "swiglu", "dequantize": "dequantize", "write": "adapters",
    "sum": "gradients",
}  # fmt: skip


def _file_of(operation: str) -> str:
    if operation.endswith("_lower"):
        return "lower"
    return "gradients" if operation.endswith("_products") else _FILES[operation.split("_")[0]]


def reference_of(operation: str) -> Callable[..., None]:
    """The plain PyTorch function behind an operation."""
    module = importlib.import_module(f"qlora_dist.model.kernels.{_file_of(operation)}")
    return getattr(module, f"_{operation}")  # type: ignore[no-any-return]


def kernel_of(operation: str) -> Callable[..., bool]:
    """The function that launches its Triton kernel, or returns False."""
    module = importlib.import_module(f"qlora_dist.model.kernels.{_file_of(operation)}_triton")
    return getattr(module, operation)  # type: ignore[no-any-return]


class _Maker:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        kind = dtype or self.dtype
        if kind == torch.uint8:
            return torch.randint(0, 256, sizes, dtype=kind, device=self.device)
        return torch.randn(*sizes, dtype=kind, device=self.device)

    def strided(self, rows: int, columns: int) -> Tensor:
        """The first columns of a wider buffer."""
        return self(rows, columns + ADAPTER_COLUMNS)[:, :columns]


def _rms_norm(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    scales = make(tokens, dtype=torch.float32) if option == "scales" else None
    return [make(tokens, shape.hidden), make(shape.hidden), EPS, scales, make.strided(tokens, shape.hidden)]


def _rms_norm_backward(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    residual = make(tokens, shape.hidden) if option == "residual" else None
    x = make(tokens, shape.hidden)
    return [make(tokens, shape.hidden), x, make(shape.hidden), EPS, residual, make(tokens, shape.hidden)]


def _norms(option: str, shape: Shape, make: _Maker) -> list[Any]:
    return [make(shape.head_dim), make(shape.head_dim)] if option == "norms" else [None, None]


def _angles(shape: Shape, tokens: int, make: _Maker) -> list[Tensor]:
    angle = make(tokens, shape.head_dim // 2, dtype=torch.float32).repeat(1, 2)
    return [angle.cos().to(make.dtype), angle.sin().to(make.dtype)]


def _rotate_heads(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    dim = shape.head_dim
    product = make(tokens, (shape.heads + 2 * shape.kv_heads) * dim)  # query, key and value in one
    x = product[:, : (shape.heads + shape.kv_heads) * dim]
    out = torch.empty_like(x) if option == "norms" else x  # in place where nothing of x is needed later
    weights, angles = _norms(option, shape, make), _angles(shape, tokens, make)
    return [x, *weights, EPS, *angles, shape.heads, dim, out]


def _rotate_heads_backward(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    dim = shape.head_dim
    grads = [make(tokens, number, dim) for number in (shape.heads, shape.kv_heads, shape.kv_heads)]
    x = make(tokens, (shape.heads + shape.kv_heads) * dim) if option == "norms" else None
    out = make.strided(tokens, (shape.heads + 2 * shape.kv_heads) * dim)
    return [*grads, x, *_norms(option, shape, make), EPS, *_angles(shape, tokens, make), out]


def _swiglu(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    return [make(tokens, 2 * shape.intermediate), make.strided(tokens, shape.intermediate)]


def _swiglu_backward(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    return [make.strided(tokens, shape.intermediate), make.strided(tokens, 2 * shape.intermediate)]


def _swiglu_backward_products(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    inner = shape.intermediate
    columns, rows = num_parts(tokens, inner)
    grad, raised = make(tokens, inner), make(tokens, shape.hidden + RANK)[:, shape.hidden :]
    of_rows = make(2 * columns, tokens, RANK, dtype=torch.float32)
    of_columns = make(rows, 3 * inner * RANK, dtype=torch.float32)
    low, b, both = make(tokens, 2 * RANK), make(2 * inner, RANK), make.strided(tokens, 2 * inner)
    return [grad, raised, low, b, 2.0, both, of_rows, of_columns]


def _sum_parts(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    """Of gate and up."""
    columns, _ = num_parts(tokens, shape.intermediate)
    parts = make(2 * columns, tokens, RANK, dtype=torch.float32)
    rows, scaled = make(tokens, dtype=torch.float32), make(tokens, 2 * RANK)
    return [parts, [columns, 2 * columns], rows, scaled, make(tokens, shape.hidden + 2 * RANK)[:, shape.hidden :]]


def _swiglu_lower(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    inner = shape.intermediate
    both, low = make.strided(tokens, 2 * inner), make(tokens, RANK)
    return [both, make(RANK, inner), low, make(tokens, inner + RANK)]


def _copy_lower(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    rows, low = make(RANK, shape.hidden), make(tokens, RANK)
    return [make(tokens, shape.hidden), rows, low, make(tokens, shape.hidden + RANK)]


def _norm_lower(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    columns, x, weight = 3 * RANK, make(tokens, shape.hidden), make(shape.hidden)
    rows, scales, low = make(columns, shape.hidden), make(tokens, dtype=torch.float32), make(tokens, columns)
    return [x, weight, EPS, rows, scales, low, make(tokens, shape.hidden + columns)]


def _raised_products(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    """Of q, k and v."""
    outputs = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
    columns, rows = num_raised(tokens, outputs)
    of_rows = make(columns, tokens, RANK, dtype=torch.float32)
    of_columns = make(rows, sum(outputs), RANK, dtype=torch.float32)
    ends = [sum(outputs[: i + 1]) for i in range(3)]
    low, b = make(tokens, 3 * RANK), make(sum(outputs), RANK)
    return [make.strided(tokens, sum(outputs)), low, b, ends, 2.0, of_rows, of_columns]


def _dequantize(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    rows, columns = shape.intermediate, shape.hidden
    blocks = rows * columns // 64
    code, codes = make(16, dtype=torch.float32), make(rows * columns // 2, 1, dtype=torch.uint8)
    if option == "single":
        constants = [make(blocks, dtype=torch.float32), None, None, None]
    else:
        nested = make(math.ceil(blocks / 256), dtype=torch.float32)
        offset = make(1, dtype=torch.float32)[0]
        constants = [make(blocks, dtype=torch.uint8), nested, make(256, dtype=torch.float32), offset]
    return [codes, code, *constants, make.strided(rows, columns)]


def _write_a(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    adapters = [make(RANK, shape.hidden, dtype=torch.float32) for _ in range(3)]
    return [adapters, make(ADAPTER_COLUMNS, shape.hidden)]


def _write_b(option: str, shape: Shape, tokens: int, make: _Maker) -> list[Any]:
    outputs = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
    adapters = [make(rows, RANK, dtype=torch.float32) for rows in outputs]
    firsts = [sum(outputs[:i]) for i in range(3)]
    return [adapters, firsts, 2.0, make(sum(outputs), shape.hidden + ADAPTER_COLUMNS)[:, shape.hidden :]]


_MAKERS = {
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "rotate_heads": _rotate_heads,
    "rotate_heads_backward": _rotate_heads_backward,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "dequantize_4bit": _dequantize,
    "swiglu_backward_products": _swiglu_backward_products,
    "sum_parts": _sum_parts,
    "swiglu_lower": _swiglu_lower,
    "copy_lower": _copy_lower,
    "norm_lower": _norm_lower,
    "raised_products": _raised_products,
    "write_a": _write_a,
    "write_b": _write_b,
}
NAMES = (
    "rms_norm", "rms_norm+scales", "rms_norm_backward", "rms_norm_backward+residual", "rotate_heads",
    "rotate_heads+norms",
    "rotate_heads_backward", "rotate_heads_backward+norms", "swiglu", "swiglu_backward", "dequantize_4bit",
    "dequantize_4bit+single", "write_a", "write_b", "swiglu_backward_products", "sum_parts",
    "swiglu_lower", "copy_lower", "norm_lower", "raised_products",
)  # fmt: skip
