"""bitsandbytes, imported without a request to the hub. `model/__init__` imports this file first, before transformers
and peft, which would import it with its messages."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any


def _import_quietly(name: str) -> Any:
    """Imports bitsandbytes without a request to the hub.

    On CPUs with AVX512-BF16 the import asks the package `kernels` to download a kernel, and prints a notice when that
    package is missing. Weights and code come only from where the user specified, and the kernel is not used (see
    `guard_cpu_layers`), so `kernels` is hidden during the import.
    """
    if name in sys.modules:
        return sys.modules[name]
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    missing = object()
    level, kernels = logger.level, sys.modules.get("kernels", missing)
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    finally:
        logger.setLevel(level)
        if kernels is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels  # type: ignore[assignment]


bitsandbytes: Any = _import_quietly("bitsandbytes")
# `Linear8bitLt` logs on every call that it computes in float16; `load_base` logs it once
logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda record: "will be cast" not in record.msg)
