"""What the NVIDIA driver reports about a GPU: clocks, power, temperature, energy.

Through the driver's library (libnvidia-ml) and ctypes: no Python package is needed for a few numbers. Read-only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

SM, MEMORY = 1, 2  # nvmlClockType_t
CORE_SENSOR = 0  # nvmlTemperatureSensors_t
READINGS = ("sm_clock_mhz", "sm_clock_max_mhz", "memory_clock_mhz", "memory_clock_max_mhz", "power_watts",
            "power_limit_watts", "temperature_celsius")  # fmt: skip


def readings(index: int = 0) -> dict[str, float | None]:
    """Clocks (MHz, current and maximum), power and its limit (watts), temperature (degrees Celsius) of a CUDA device.

    None for each reading that NVML does not report: no driver, a virtual device, a reading that the card lacks.
    """
    opened = _open(index)
    if opened is None:
        return dict.fromkeys(READINGS)
    library, handle = opened

    def ask(name: str, *arguments: int, scale: float = 1) -> float | None:
        found = ctypes.c_uint()
        return found.value * scale if _succeeds(library, name, handle, *arguments, ctypes.byref(found)) else None

    return {
        "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", SM),
        "sm_clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", SM),
        "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", MEMORY),
        "memory_clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", MEMORY),
        "power_watts": ask("nvmlDeviceGetPowerUsage", scale=1e-3),
        "power_limit_watts": ask("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3),
        "temperature_celsius": ask("nvmlDeviceGetTemperature", CORE_SENSOR),
    }


def energy_joules(index: int = 0) -> float | None:
    """Energy that the GPU has used since its driver was loaded, joules; None if NVML does not report it."""
    opened = _open(index)
    millijoules = ctypes.c_ulonglong()
    if opened is None or not _succeeds(opened[0], "nvmlDeviceGetTotalEnergyConsumption", opened[1],
                                       ctypes.byref(millijoules)):  # fmt: skip
        return None
    return millijoules.value / 1000


def _library() -> Any | None:
    try:
        return ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None


@lru_cache(maxsize=16)
def _open(index: int) -> tuple[Any, ctypes.c_void_p] | None:
    """The library and its handle of a CUDA device; None if there is none."""
    library = _library()
    if library is None or not _succeeds(library, "nvmlInit_v2"):
        return None
    handle = ctypes.c_void_p()
    # NVML numbers all GPUs of the machine, CUDA those that CUDA_VISIBLE_DEVICES leaves: only the UUID is the same
    uuid = _uuid(index)
    by_uuid = uuid is not None and _succeeds(
        library, "nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid), ctypes.byref(handle)
    )
    if by_uuid or _succeeds(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle)):
        return library, handle
    return None


def _uuid(index: int) -> bytes | None:
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None) if torch.cuda.is_available() else None
    return None if uuid is None else f"GPU-{uuid}".encode()


def _succeeds(library: Any, name: str, *arguments: Any) -> bool:
    """Whether the library has this function and it returned NVML_SUCCESS."""
    function: Callable[..., int] | None = getattr(library, name, None)
    return function is not None and function(*arguments) == 0
