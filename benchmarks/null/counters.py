"""What the null device counts in this process, and the process's own time."""

from __future__ import annotations

import ctypes
import os
import time

IS_NULL = "NULL_GPU_LIB" in os.environ  # set by build/null/python


def reset() -> None:
    """The device's totals start again."""
    _library().null_reset()


def read() -> dict[str, float]:
    """Launched kernels, FLOPs of matrix products, synchronizations; CPU seconds of this process (all threads)."""
    library = _library()
    return {
        "launches": library.null_launches(),
        "product_flops": library.null_flops(),
        "synchronizations": library.null_syncs(),
        "cpu_seconds": time.process_time(),
    }


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["NULL_GPU_LIB"])
    library.null_flops.restype = ctypes.c_double
    library.null_launches.restype = library.null_syncs.restype = ctypes.c_long
    return library
