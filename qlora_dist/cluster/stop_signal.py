"""Stop signals become a flag that the training loop reads at the end of each step.

SIGTERM (preemption, scancel, kill), SIGUSR1 (Slurm's warning before the time limit) and a first Ctrl-C ask for a
checkpoint and a clean end, however often they come. A second Ctrl-C ends at once. While a run starts, when there is
nothing to save yet, a signal may break off what is going on (`interrupting`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_heard_early: list[int] = []


class StopRequested(BaseException):
    """The run was asked to stop. Not an Exception: nothing on the way may take it for an error."""


def listen() -> None:
    """Remembers stop signals until a `StopSignal` takes over. The first thing a process does, before heavy imports."""
    for number in STOP_SIGNALS[:2]:
        signal.signal(number, _hear)


def _hear(number: int, _frame: FrameType | None) -> None:
    _heard_early.append(number)


class StopSignal:
    """Context manager. `requested` is True once a stop signal came to this process; ranks agree by a sum."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_listening = False
        self._process = os.getpid()
        self._previous: dict[int, object] = {}
        self._interrupts = False

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __enter__(self) -> StopSignal:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        self.is_listening = True
        while _heard_early:
            self._on_signal(_heard_early.pop(0), None)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.is_listening = False
        for number, handler in self._previous.items():
            if kind is not None and handler is _hear:
                handler = signal.SIG_DFL  # after a failure SIGTERM is the launcher's, which ends the other ranks
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a stop signal (also one that came before) raises StopRequested: for work that can be thrown away."""
        self._interrupts = True
        try:
            if self.requested:
                raise StopRequested(self.name)
            yield
        finally:
            self._interrupts = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker, that tokenizes: it has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        if self.name != "SIGTERM":  # the last word: a job that is told to end is not requeued by its own
            self.name = signal.Signals(number).name
        if self._interrupts:
            self._interrupts = False  # once: what cleans up after it is not broken off by the next one
            raise StopRequested(self.name)
