"""GPUs and CPU: driver, NCCL, bitsandbytes, a 4-bit round trip on each device, paged memory, attention."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

from ...files import format_bytes
from .finding import Finding, reason

# Root mean square error of NF4 (blocks of 64, double quantization) on normally distributed weights, relative to their
# root mean square: 0.0921. Sampling moves it by less than 0.001 at 2**18 weights, bfloat16 by as little.
NF4_ERROR_RANGE = (0.090, 0.094)


def check_cuda() -> Iterator[Finding]:
    import torch

    driver = _nvidia_driver()
    if torch.version.cuda is None and driver is not None:
        advice = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        yield Finding("warn", "CUDA", f"an NVIDIA driver ({driver}) but a CPU build of torch", advice)
    elif torch.version.cuda is None:
        yield Finding("warn", "CUDA", "no NVIDIA driver, and a CPU build of torch", "only the CPU can be used")
    elif not torch.cuda.is_available():
        advice = "install or update the driver; in a container, start it with GPU access (--gpus all)"
        yield Finding("warn", "CUDA", f"torch is built for {torch.version.cuda} but finds no GPU", advice)
    else:
        yield Finding("ok", "CUDA", f"{torch.version.cuda}, driver {driver or 'unknown'}")

    import torch.distributed as dist

    if torch.cuda.is_available():
        if dist.is_nccl_available():
            yield Finding("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        else:
            yield Finding(
                "missing", "NCCL", "torch has no NCCL", "needed for several GPUs: install a Linux build of torch"
            )
    if dist.is_available() and dist.is_gloo_available():
        yield Finding("ok", "gloo", "available (several processes on a CPU)")
    else:
        yield Finding("missing", "gloo", "torch has no gloo", "needed for several processes on a CPU")


def check_bitsandbytes() -> Iterator[Finding]:
    from ...model.bitsandbytes_import import bitsandbytes

    library = bitsandbytes.cextension.lib
    if isinstance(library, bitsandbytes.cextension.ErrorHandlerMockBNBNativeLibrary):
        advice = "reinstall bitsandbytes, or a torch for a CUDA version that it ships"
        yield Finding("missing", "bitsandbytes library", library.error_msg.splitlines()[0], advice)
    else:
        build = "CUDA" if library.compiled_with_cuda else "CPU"
        yield Finding("ok", "bitsandbytes library", f"loaded, {build} build")


def check_devices() -> Iterator[Finding]:
    """Each device: what it is, and whether weights survive a round trip through 4 bits on it."""
    import torch

    for index in range(torch.cuda.device_count()):
        yield _describe_gpu(index)
        yield check_round_trip(f"cuda:{index}")
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", "CPU", f"{torch.get_num_threads()} threads, {capability}")
    yield check_round_trip("cpu")


def _describe_gpu(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    subject = f"GPU {index}"
    found = (
        f"{properties.name}, {format_bytes(properties.total_memory)}, "
        f"compute capability {properties.major}.{properties.minor}"
    )
    if properties.major < 8:
        return Finding("warn", subject, f"{found}, no bfloat16", "set model.compute_dtype=float32 (slow)")
    return Finding("ok", subject, f"{found}, bfloat16")


def check_round_trip(device: str) -> Finding:
    """Measures the error of NF4 with double quantization on normally distributed weights."""
    subject = f"4-bit on {device}"
    try:
        error = nf4_relative_error(device)
    except ImportError as failure:
        return Finding("missing", subject, f"not checked ({reason(failure)})", "install what is missing above")
    except Exception as failure:
        return Finding("missing", subject, reason(failure), "bitsandbytes does not work on this device")
    low, high = NF4_ERROR_RANGE
    found = f"NF4 round trip changes weights by {error:.4f} (expected {low:.3f} to {high:.3f})"
    if low <= error <= high:
        return Finding("ok", subject, found, can_train=True)
    return Finding("missing", subject, found, "wrong arithmetic: do not train here; reinstall bitsandbytes")


def nf4_relative_error(device: str) -> float:
    """Root mean square of (dequantized - weight) over that of the weight, for 2**18 normal weights."""
    import torch

    from ...model.bitsandbytes_import import bitsandbytes

    # drawn on the CPU: the same weights on every device
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    restored = bitsandbytes.functional.dequantize_4bit(packed, state)
    return ((restored - weight).norm() / weight.norm()).item()


def check_paged_memory() -> Iterator[Finding]:
    """What paged optimizers need: memory that the GPU writes and the CPU reads."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("ok", "paged memory", "not needed without a GPU")
    for index in range(torch.cuda.device_count()):
        yield _check_paged_memory_of(index)


def _check_paged_memory_of(index: int) -> Finding:
    import torch

    from ...model.bitsandbytes_import import bitsandbytes

    subject = f"paged memory, GPU {index}"
    advice = "use optim.name=adamw_8bit instead of a paged optimizer"
    # checked first: without it, bitsandbytes exits the process instead of raising
    if not _has_managed_memory(index):
        return Finding("warn", subject, "the driver offers no managed memory", advice)
    tensor = bitsandbytes.functional.get_paged(256, 256, dtype=torch.float32, device=torch.device("cuda", index))
    with torch.cuda.device(index):
        bitsandbytes.functional.fill(tensor, 3.0)
    if not bool((tensor == 3.0).all()):
        return Finding("warn", subject, "the CPU does not see what the GPU wrote", advice)
    return Finding("ok", subject, "written by the GPU, read by the CPU")


def _has_managed_memory(index: int) -> bool:
    """Asks the driver whether CPU and GPU can access managed memory concurrently; torch does not expose it."""
    import ctypes

    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    device, value = ctypes.c_int(), ctypes.c_int()
    concurrent_managed_access = 89  # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), index) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(value), concurrent_managed_access, device) == 0
        and value.value == 1
    )


def _nvidia_driver() -> str | None:
    """The driver's version, None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = answer.stdout.splitlines()
    return lines[0].strip() if answer.returncode == 0 and lines else None


def check_attention() -> Iterator[Finding]:
    import torch

    try:
        importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        yield Finding("warn", "varlen attention", "not in this torch", "upgrade torch, or install flash-attn")
        return
    where = "in torch" if torch.cuda.is_available() else "in torch; on a CPU torch's SDPA is used"
    yield Finding("ok", "varlen attention", where)
