"""Memory of a process, bytes: resident and anonymous on a CPU, allocated and reserved on a GPU; caps; by item."""

from __future__ import annotations

import ctypes
import gc
import resource
import threading
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint

GIB = 2**30


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, VmHWM (largest VmRSS), RssAnon, RssFile. 0 if it is missing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


class MemoryWatch:
    """Peaks of two phases, loading and the steps: absolute, and above what the imports alone took."""

    def __init__(self, device: torch.device, interval_seconds: float = 0.05) -> None:
        self._device = device
        self._interval = interval_seconds
        self._stopped = threading.Event()
        self._anonymous = 0
        self._load: dict[str, int] = {}
        self.baseline_rss = self.baseline_anonymous = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def imported(self) -> None:
        """Call when everything is imported and nothing is loaded yet."""
        _wake_libraries()
        gc.collect()
        self.baseline_rss, self.baseline_anonymous = status_bytes("VmRSS"), status_bytes("RssAnon")
        self._thread.start()

    def loaded(self) -> None:
        """Call before the first step: from here on the peaks are those of training."""
        gc.collect()
        # return the free pages that the allocator keeps after loading to the system, for every method
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self._load = {"rss_bytes": status_bytes("VmHWM"), "anonymous_bytes": self._anonymous}
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        except OSError:
            self._load["not_reset"] = 1
        self._anonymous = 0
        if self._device.type == "cuda":
            self._load["allocated_bytes"] = torch.cuda.max_memory_allocated(self._device)
            self._load["reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def result(self) -> dict[str, Any]:
        """All results, bytes."""
        self._stopped.set()
        peak_rss, anonymous = status_bytes("VmHWM"), max(self._anonymous, status_bytes("RssAnon"))
        found: dict[str, Any] = {
            "baseline_rss_bytes": self.baseline_rss,
            "baseline_anonymous_bytes": self.baseline_anonymous,
            "load": self._load,
            "steps_peak_rss_bytes": peak_rss,
            "steps_peak_anonymous_bytes": anonymous,
            "max_rss_bytes": max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, peak_rss,
                                 self._load.get("rss_bytes", 0)),
        }  # fmt: skip
        # of training alone, without interpreter and libraries: what a plan can predict
        found["peak_bytes"] = anonymous - self.baseline_anonymous
        if self._device.type == "cuda":
            found["allocated_bytes"] = torch.cuda.max_memory_allocated(self._device)
            found["reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
            found["peak_bytes"] = found["allocated_bytes"]
        return found

    def _sample(self) -> None:
        while not self._stopped.wait(self._interval):
            self._anonymous = max(self._anonymous, status_bytes("RssAnon"))


class DeviceWatch:
    """The most bytes in use on a GPU while this is open: context, allocator, resident managed memory, and other
    processes. Sampled every `interval_seconds`; None on a CPU."""

    def __init__(self, device: torch.device, interval_seconds: float = 1.0) -> None:
        self._device, self._interval = device, interval_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes: int | None = None

    def __enter__(self) -> DeviceWatch:
        if self._device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._device.type == "cuda":
            self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes or 0, device_used_bytes(self._device))
            if self._stopped.wait(self._interval):
                return


def _wake_libraries() -> None:
    """One update of a 64 x 64 layer, so that what torch imports and allocates at first use is in the baseline."""
    layer = torch.nn.Linear(64, 64)
    inputs = torch.ones(64, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=False).float().sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def device_used_bytes(device: torch.device) -> int:
    """Bytes in use on the whole device now, including the context and other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def set_cap(cap_bytes: int, device: torch.device) -> dict[str, int]:
    """Emulates a device with less memory. On CUDA the allocator gets the cap minus the measured context; on a CPU the
    process's private memory (RLIMIT_DATA) may grow by the cap."""
    if device.type == "cuda":
        torch.zeros(1, device=device)
        context = device_used_bytes(device) - torch.cuda.memory_reserved(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.001, min(1.0, (cap_bytes - context) / total)), device)
        return {"cap_bytes": cap_bytes, "context_bytes": context}
    used = status_bytes("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (used + cap_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return {"cap_bytes": cap_bytes, "context_bytes": used}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(
        sign in text for sign in ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    )


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {_storage(tensor).data_ptr(): _storage(tensor).nbytes() for tensor in tensors}
    return sum(storages.values())


def _storage(tensor: Any) -> torch.UntypedStorage:
    """A tensor's storage on this rank; for a sharded tensor, the local shard's."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.untyped_storage()


def items(model: torch.nn.Module, optimizer: Any, trainable: Any, gradients: Any) -> dict[str, int]:
    """Bytes that persist over a step, from the live tensors of any engine: base, adapters, gradients, states."""
    trainable = list(trainable)
    own = {_storage(tensor).data_ptr() for tensor in trainable}
    base = []
    for tensor in [*model.parameters(), *model.buffers()]:
        if _storage(tensor).data_ptr() not in own:
            base.append(tensor)
        base += _quantization_constants(tensor)
    for module in model.modules():
        scales = getattr(getattr(module, "state", None), "SCB", None)
        base += [scales] if isinstance(scales, torch.Tensor) else []
    states = [value for state in _states(optimizer) for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        "base": tensor_bytes(base),
        "trainable": tensor_bytes(trainable),
        "gradients": tensor_bytes(gradients),
        "optimizer": tensor_bytes(states),
    }


def _states(optimizer: Any) -> list[dict[str, Any]]:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return [] if inner is None else list(inner.state.values())


def _quantization_constants(tensor: Any) -> list[torch.Tensor]:
    state = getattr(tensor, "quant_state", None)
    found = []
    while state is not None:
        found += [value for value in (state.absmax, state.code, state.offset) if isinstance(value, torch.Tensor)]
        state = getattr(state, "state2", None)
    return found
