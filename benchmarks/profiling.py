"""Where a step's time goes, kernel by kernel: torch's profiler over a few steps, as a table instead of a trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

WARMUP_STEPS = 1  # starting the profiler distorts its first step
MAX_ROWS = 60
MAX_NAME_LENGTH = 160  # template names of kernels have thousands of characters


class StepProfile:
    """Profiles `num_steps` steps after one warm-up step: kernels on a GPU, torch's operators on a CPU."""

    def __init__(self, device: torch.device, num_steps: int, sync: Callable[[], None]) -> None:
        """sync: waits for the device."""
        self._device, self._num_steps, self._sync = device, num_steps, sync
        self._left = self._warmup_left = 0
        self._mark = 0.0
        self._profiler: Any = None
        self.table: dict[str, Any] | None = None  # after the last step

    @property
    def num_steps(self) -> int:
        """Total steps, including warm-up."""
        return self._num_steps + WARMUP_STEPS if self._num_steps else 0

    def start(self) -> bool:
        """Call before the first profiled step. False: there is nothing to profile."""
        if not self._num_steps:
            return False
        self._left, self._warmup_left = self._num_steps, WARMUP_STEPS
        is_gpu = self._device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if is_gpu else torch.profiler.ProfilerActivity.CPU
        self._profiler = torch.profiler.profile(
            activities=[activity],  # both would slow down the host, whose delays are part of the measurement
            schedule=torch.profiler.schedule(wait=0, warmup=WARMUP_STEPS, active=self._num_steps, repeat=1),
        )
        self._profiler.start()
        return True

    def step_done(self) -> bool:
        """Call after each step. False: it was the last one, and `table` is set."""
        self._sync()
        now = time.perf_counter()
        if self._warmup_left > 0:
            self._warmup_left -= 1
        else:
            self._left -= 1
        if self._left > 0:
            self._profiler.step()
            if self._left == self._num_steps:
                self._sync()
                self._mark = time.perf_counter()
            return True
        self._profiler.stop()
        is_gpu = self._device.type == "cuda"
        times = _kernels(self._profiler.key_averages()) if is_gpu else _operators(self._profiler.key_averages())
        self.table = table_of(times, (now - self._mark) * 1e6, self._num_steps) | {"device": self._device.type}
        if not times:
            self.table["reason"] = "the profiler saw no kernel (CUPTI may be missing, or not permitted for this user)"
        self._profiler = None
        return False


def table_of(times: Iterable[tuple[str, int, float]], wall_microseconds: float, num_steps: int) -> dict[str, Any]:
    """(name, calls, microseconds) over `num_steps` steps -> values per step; the longest rows first.

    `busy_share` is the total kernel time over wall time: above 1 where kernels run concurrently.
    """
    by_name: dict[str, tuple[int, float]] = {}
    for name, calls, microseconds in times:
        short = name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 3] + "..."
        old = by_name.get(short, (0, 0.0))
        by_name[short] = (old[0] + calls, old[1] + microseconds)
    ordered = sorted(by_name.items(), key=lambda row: -row[1][1])
    total = sum(microseconds for _, (_, microseconds) in ordered)

    def row(name: str, calls: int, microseconds: float) -> dict[str, Any]:
        return {
            "name": name,
            "calls_per_step": calls / num_steps,
            "microseconds_per_step": round(microseconds / num_steps, 3),
        }

    rest = [values for _, values in ordered[MAX_ROWS:]]
    return {
        "num_steps": num_steps,
        "wall_microseconds_per_step": wall_microseconds / num_steps,
        "kernel_microseconds_per_step": total / num_steps,
        "kernels_per_step": sum(calls for _, (calls, _) in ordered) / num_steps,
        "busy_share": total / wall_microseconds,
        "num_names": len(ordered),
        "kernels": [row(name, *values) for name, values in ordered[:MAX_ROWS]],
        "others": row("", sum(calls for calls, _ in rest), sum(microseconds for _, microseconds in rest)),
    }


def _kernels(averages: Any) -> list[tuple[str, int, float]]:
    """Kernels, copies and fills on the GPU; named ranges that cover them would count them twice."""
    return [
        (event.key, event.count, event.self_device_time_total)
        for event in averages
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.key.startswith("ProfilerStep")
    ]


def _operators(averages: Any) -> list[tuple[str, int, float]]:
    return [
        (event.key, event.count, event.self_cpu_time_total)
        for event in averages
        if not event.key.startswith("ProfilerStep")
    ]
