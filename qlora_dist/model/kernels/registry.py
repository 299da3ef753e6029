"""Registers the operations of this folder with torch, so that tracing and simulation see each as one operation.

Every operation writes into tensors that its caller allocated. Its plain PyTorch reference runs on a CPU, and on a GPU
where Triton is missing; the Triton kernel gives the same values.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

log = logging.getLogger(__name__)
_started: set[str] = set()  # kernels that have run in this process
_unusable: set[str] = set()  # ... and those that could not
_LIBRARY = torch.library.Library("qlora_dist", "FRAGMENT")


def register(schema: str, reference: Callable[..., None], module: str | None = None) -> Any:
    """Defines `qlora_dist::NAME` by its schema; returns the operation.

    On CUDA with Triton it is the function NAME of `module`, a file of this folder. That returns False, having written
    nothing, for arguments that it leaves to the reference.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    has_kernel = module is not None and importlib.util.find_spec("triton") is not None
    _LIBRARY.impl(name, reference, "CPU")
    _LIBRARY.impl(name, partial(_run, f".{module}", name, reference) if has_kernel else reference, "CUDA")
    # outputs are the caller's: under fake tensors nothing remains to be done
    torch.library.register_fake(f"qlora_dist::{name}", partial(_nothing), lib=_LIBRARY)
    return getattr(torch.ops.qlora_dist, name).default


def _run(module: str, name: str, reference: Callable[..., None], *arguments: Any) -> None:
    if name in _unusable or not _launch(module, name, arguments):
        reference(*arguments)


def _launch(module: str, name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the Triton kernel has done the work. One that cannot start here is said, and not tried again."""
    try:
        # at the first call: a CPU installation has no Triton, and importing it takes a second
        kernel = getattr(importlib.import_module(module, __package__), name)
        # Triton launches on the current device; the last argument of every operation is a tensor that it writes
        with torch.cuda.device_of(arguments[-1]):
            is_done = bool(kernel(*arguments))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler for Triton's launcher, a driver that does not know its code, ...
        if name in _started:
            raise
        _unusable.add(name)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        log.warning(
            "the Triton kernel %s does not start here (%s: %s); its PyTorch reference is used, which is slower. Triton "
            "needs a C compiler (gcc or clang, or CC) and a driver that knows its code",
            name, type(error).__name__, reason[0],
        )  # fmt: skip
        return False
    _started.add(name)
    return is_done


def _nothing(*_args: Any, **_keywords: Any) -> None:
    return None


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the type that statistics and sums are computed in: fp32, fp64 for fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
