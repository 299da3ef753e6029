"""Stop signals become a flag that the training loop reads at the end of each step.

SIGTERM (preemption, scancel, kill), SIGUSR1 (Slurm's warning before the time limit), SIGHUP (the terminal was closed;
unless it was ignored at the start, as under nohup) and a first Ctrl-C request a checkpoint and a clean exit, however
often they arrive; so does the end of the launcher. A second Ctrl-C exits at once. While a run starts, when there is
nothing to save yet, a signal may interrupt the current work (`interrupting`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
LAUNCHER_ENDED = "the end of its launcher"  # in place of a signal's name
_received_early: list[int] = []
_parent_at_start: int | None = None
_was_terminated = False


class StopRequested(BaseException):
    """The run was asked to stop. Not an Exception: no handler on the way may mistake it for an error."""


def listen() -> None:
    """Records stop signals until a `StopSignal` takes over. Called first in a process, before heavy imports."""
    global _parent_at_start
    _parent_at_start = os.getppid()  # a launcher may end before the imports have
    for number in _heard(STOP_SIGNALS):
        if number != signal.SIGINT:
            signal.signal(number, _record)


def parent_at_start() -> int:
    """The process id of the parent that this process began with, as far back as it is known."""
    return os.getppid() if _parent_at_start is None else _parent_at_start


def _heard(signals: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """Without SIGHUP where it is ignored (nohup). Launchers ignore SIGUSR1 for themselves, not for their workers."""
    return [n for n in signals if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def was_terminated() -> bool:
    """Whether SIGTERM has arrived, as it does when a launcher ends a rank because another has ended."""
    return _was_terminated


def _note(number: int) -> None:
    global _was_terminated
    _was_terminated = _was_terminated or number == signal.SIGTERM


def _record(number: int, _frame: FrameType | None) -> None:
    _note(number)
    _received_early.append(number)


class StopSignal:
    """Context manager. `requested` is True once this process received a stop signal; ranks agree on it by a sum."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_listening = False
        self._process = os.getpid()
        self._previous: dict[int, object] = {}
        self._interrupts = False
        self._cause: str | None = None
        self._terminals: list[int] = []

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals reach the main thread alone: nothing can be heard here
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in _heard(STOP_SIGNALS):
            self._previous[number] = signal.signal(number, self._on_signal)
        self.is_listening = True
        while _received_early:
            self._on_signal(_received_early.pop(0), None)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.is_listening = False
        for number, handler in self._previous.items():
            if kind is not None and handler is _record:
                handler = signal.SIG_DFL  # after a failure SIGTERM comes from the launcher, which ends the other ranks
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a stop signal (also one received before) raises StopRequested: for work that can be discarded."""
        self._interrupts = True
        try:
            if self.requested:
                raise StopRequested(self.name)
            yield
        finally:
            self._interrupts = False

    def request(self, name: str) -> None:
        """As if a stop signal had arrived, from any thread; `name` says why. Only while it listens."""
        self._cause = name
        os.kill(os.getpid(), signal.SIGUSR1)  # its handler runs in the main thread, which it may interrupt

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked tokenization worker: it has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _note(number)
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        if self.name != "SIGTERM":  # has the last word: a job that is told to end must not requeue itself
            self.name = self._cause or signal.Signals(number).name
        self._cause = None
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self._interrupts:
            self._interrupts = False  # once: the cleanup after it must not be interrupted by the next one
            raise StopRequested(self.name)

    def _leave_terminal(self) -> None:
        """Output to a terminal that was closed fails, which would end the run before it has saved."""
        for descriptor in self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
        self._terminals = []
