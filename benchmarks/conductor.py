"""Turns and timing of one cell: when it may step, and how long each step took.

The cells of a group are processes that are all loaded at once and step alternately, a few steps per turn, so that a
slow moment of the machine affects all of them equally. The parent (throughput) writes `turn N` to a worker's stdin and
waits for its answer; a worker that runs alone takes its steps in one go.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch

from . import provenance
from .profiling import StepProfile

PHASES = ("data", "forward", "backward", "communication", "optimizer")


def host_counters() -> dict[str, float]:
    """User and system seconds of this process so far, all its threads."""
    return {"cpu_seconds": time.process_time()}


class Conductor:
    """Called by an engine after every step; its answer is whether to continue.

    Steps: warm-up, then timed ones in turns, then instrumented ones (with a device synchronization at every phase
    boundary, so they are kept apart from the timed ones), then profiled ones, if requested.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        warmup_steps: int,
        steps: int,
        instrumented_steps: int,
        profile_steps: int = 0,
        orders: IO[str] | None = None,
        answers: IO[str] | None = None,
        counters: Callable[[], dict[str, float]] = host_counters,
    ) -> None:
        """counters: running totals; `turns` has what each turn of timed steps adds to them."""
        self._device = device
        self._counters = counters
        self._at_start: dict[str, float] = {}  # of the turn
        self.turns: list[dict[str, float]] = []
        self._warmup_left = warmup_steps
        self._alone_steps = steps
        self._instrumented_left = instrumented_steps
        self._orders, self._answers = orders, answers
        self._profile = StepProfile(device, profile_steps, self._sync)
        self._is_profiled = False
        self.state_after: dict[str, float | None] | None = None  # device state right after the last timed step
        self._turn_steps = self._turn_left = 0
        self._events: list[Any] = []
        self._pending: list[dict[str, Any]] = []
        self.is_instrumented = False
        self.samples: list[dict[str, Any]] = []
        self.phases: list[dict[str, float]] = []
        self._current: dict[str, float] = {}
        self._mark = 0.0
        self._started = time.perf_counter()
        self.startup_seconds = 0.0

    @property
    def profile(self) -> dict[str, Any] | None:
        """Kernel table (`profiling.table_of`); None if no profile was requested or its steps are not finished."""
        return self._profile.table

    def start(self) -> None:
        """Everything is loaded; the first step begins."""
        self.startup_seconds = time.perf_counter() - self._started
        self._resume()

    def step_done(self, num_tokens: int, num_labels: int, loss: float | None = None) -> bool:
        """After a step. False: stop."""
        if self._is_profiled:
            return self._profile.step_done()
        if self.is_instrumented:
            self._sync()
            total = time.perf_counter() - self._mark
            self.phases.append({**dict.fromkeys(PHASES, 0.0), **self._current, "total": total})
            self._current = {}
            self._instrumented_left -= 1
            self._mark = time.perf_counter()
            return self._instrumented_left > 0 or self._start_profile()
        if self._warmup_left > 0:
            self._warmup_left -= 1
            if self._warmup_left > 0:
                return True
            return self._next_turn("ready")
        self._record(num_tokens, num_labels, loss)
        self._turn_left -= 1
        if self._turn_left > 0:
            return True
        self._close_turn()
        return self._next_turn("turn")

    @contextmanager
    def phase(self, name: str, excluding: tuple[str, ...] = ()) -> Iterator[None]:
        """Times a part of a step, minus the phases in `excluding` inside it. Costs nothing outside the instrumented
        steps."""
        if not self.is_instrumented:
            yield
            return
        self._sync()
        inside = sum(self._current.get(other, 0.0) for other in excluding)
        started = time.perf_counter()
        yield
        self._sync()
        inside = sum(self._current.get(other, 0.0) for other in excluding) - inside
        self.add(name, time.perf_counter() - started - inside)

    def add(self, name: str, seconds: float) -> None:
        """Adds time of a phase that the engine measured itself."""
        if self.is_instrumented:
            self._current[name] = self._current.get(name, 0.0) + seconds

    def split(self) -> dict[str, float]:
        """Mean seconds of each phase over the instrumented steps; `other` is the time that no phase covers."""
        if not self.phases:
            return {}
        mean = {key: sum(step[key] for step in self.phases) / len(self.phases) for key in (*PHASES, "total")}
        mean["other"] = max(0.0, mean["total"] - sum(mean[key] for key in PHASES))
        return mean

    # --- inner parts ---

    def _record(self, num_tokens: int, num_labels: int, loss: float | None) -> None:
        sample = {"tokens": num_tokens, "labels": num_labels, "loss": loss}
        if self._device.type == "cuda":  # no synchronization per step: peers may run ahead of the device
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
            self._pending.append(sample)
            return
        now = time.perf_counter()
        self.samples.append({**sample, "seconds": now - self._mark})
        self._mark = now

    def _close_turn(self) -> None:
        self._sync()
        for i, sample in enumerate(self._pending):
            seconds = self._events[i].elapsed_time(self._events[i + 1]) / 1000
            self.samples.append({**sample, "seconds": seconds})
        self._pending, self._events = [], []
        now = self._totals()
        self.turns.append({"steps": self._turn_steps, **{name: now[name] - self._at_start[name] for name in now}})

    def _totals(self) -> dict[str, float]:
        return {"seconds": time.perf_counter(), **self._counters()}

    def _next_turn(self, event: str) -> bool:
        order = self._ask(event)
        if order[0] == "turn":
            self._turn_steps = self._turn_left = int(order[1])
            self._resume()
            return True
        if event == "turn":  # before anything else runs: the clocks still reflect the load
            self.state_after = provenance.device_state(self._device)
        self.is_instrumented = self._instrumented_left > 0
        self._resume()
        return self.is_instrumented or self._start_profile()

    def _start_profile(self) -> bool:
        self.is_instrumented = False  # no more synchronization at phase boundaries
        self._is_profiled = self._profile.start()
        return self._is_profiled

    def _ask(self, event: str) -> list[str]:
        if self._orders is None or self._answers is None:
            return ["turn", str(self._alone_steps)] if event == "ready" and self._alone_steps else ["finish"]
        self._answers.write(json.dumps({"event": event}) + "\n")
        self._answers.flush()
        line = self._orders.readline()
        return line.split() or ["finish"]  # the parent is gone

    def _resume(self) -> None:
        self._sync()
        if self._device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True)]
            self._events[0].record()
        self._at_start = self._totals()
        self._mark = time.perf_counter()

    def _sync(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
