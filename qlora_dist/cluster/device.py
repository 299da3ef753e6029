"""Which device a run uses, as far as it is known before torch is imported."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import socket

from ..errors import UserError


def why_no_cuda() -> str | None:
    """Why this process cannot have a GPU; None when it may have one, which torch finds out. Milliseconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}"
    build = importlib.metadata.version("torch").partition("+")[2]
    if build == "cpu":
        return "this torch was built without CUDA (its version ends in +cpu)"
    if build.startswith("rocm"):
        return None
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    return None


def visible_gpus() -> int | None:
    """How many GPUs this process may use at most, as far as that is known without torch; None: not known."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip()])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus")) or None
    except OSError:  # containers do not always show it
        return None


def require_cuda(wanted: str, missing: str | None) -> None:
    """Raises UserError when the config asks for a GPU and there is none: hours later nobody wants a run on the CPU."""
    if wanted == "cuda" and missing is not None:
        raise UserError(
            f"device is cuda, but {socket.gethostname()} has no GPU for this run: {missing}. Check nvidia-smi and the "
            "installation (qlora-dist doctor); to train on the CPU on purpose: --set device=cpu"
        )
