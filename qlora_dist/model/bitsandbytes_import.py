"""bitsandbytes, imported without a request to the hub and without torch's compiler. `model/__init__` imports this file
first, before transformers and peft, which would import it with its messages."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Hides the package `kernels`.

    On CPUs with AVX512-BF16 the import of bitsandbytes asks it to download a kernel, and prints a notice when it is
    missing. Weights and code come only from where the user specified, and the kernel is not used (see
    `guard_cpu_layers`).
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    missing = object()
    level, kernels = logger.level, sys.modules.get("kernels", missing)
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logger.setLevel(level)
        if kernels is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels  # type: ignore[assignment]


@contextmanager
def _compiling_at_the_first_call() -> Iterator[None]:
    """Compiles what is decorated with torch.compile when it is first called.

    torch.compile would import the whole compiler at once: seconds at every start of every rank, for functions that
    bitsandbytes does not use on a GPU.
    """
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*arguments, **named)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def _import_quietly(name: str) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    with _without_kernels(), _compiling_at_the_first_call():
        return importlib.import_module(name)


bitsandbytes: Any = _import_quietly("bitsandbytes")
# `Linear8bitLt` logs on every call that it computes in float16; `load_base` logs it once
logging.getLogger("bitsandbytes.autograd._functions").addFilter(lambda record: "will be cast" not in record.msg)
