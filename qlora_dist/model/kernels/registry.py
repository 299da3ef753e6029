"""Registers the operations of this folder with torch, so that tracing and simulation see each as one operation.

Every operation writes into tensors that its caller allocated. Its plain PyTorch reference runs on a CPU, and on a GPU
where Triton is missing; the Triton kernel gives the same values.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

_LIBRARY = torch.library.Library("qlora_dist", "FRAGMENT")


def register(schema: str, reference: Callable[..., None], kernel: Callable[..., None] | None = None) -> Any:
    """Defines `qlora_dist::NAME` by its schema; returns the operation. `kernel` is used on CUDA if Triton is there."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    on_gpu = reference if kernel is None or importlib.util.find_spec("triton") is None else kernel
    _LIBRARY.impl(name, reference, "CPU")
    _LIBRARY.impl(name, on_gpu, "CUDA")
    # outputs are the caller's: under fake tensors nothing remains to be done
    torch.library.register_fake(f"qlora_dist::{name}", partial(_nothing), lib=_LIBRARY)
    return getattr(torch.ops.qlora_dist, name).default


def _nothing(*_args: Any, **_keywords: Any) -> None:
    return None


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the type that statistics and sums are computed in: fp32, fp64 for fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
