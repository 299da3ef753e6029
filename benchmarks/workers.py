"""The processes of a cell, seen from the one that runs the grid: start, orders, time limits, end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cells import Cell
from .provenance import ROOT


@dataclass
class Worker:
    """A running cell."""

    cell: Cell
    out: Path
    log: Path
    processes: list[subprocess.Popen[str]]
    deadline: float
    has_timed_out: bool = False

    @property
    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def ask(self, order: str | None) -> bool:
        """Gives an order (None: only wait) and waits for the answer. False: no more turns from this one."""
        main = self.processes[0]
        assert main.stdin is not None and main.stdout is not None
        try:
            if order is not None:
                main.stdin.write(order + "\n")
                main.stdin.flush()
        except BrokenPipeError:
            return False
        with _alarm(self):
            return bool(main.stdout.readline())

    def wait(self) -> None:
        """Until all its processes have ended, or its time is up."""
        for process in self.processes:
            try:
                process.wait(max(0.1, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.has_timed_out = True
                break
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _alarm(worker: Worker) -> Any:
    """Ends a worker that does not answer within its time: its pipe then closes and the read returns."""

    def expire(*_: Any) -> None:
        worker.has_timed_out = True
        worker.kill()

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, worker.deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def start(cell: Cell, command: list[str], log: Path, *, joined: bool) -> list[subprocess.Popen[str]]:
    """One process for each of the cell's ranks; joined: one, with this process's own place. stderr goes to `log`."""
    port = _free_port()
    processes = []
    for rank in range(1 if joined else cell.ranks):
        with log.open("a") as stderr:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=_environment(cell, None if joined else rank, port),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    start_new_session=True,
                )
            )
    return processes


def _environment(cell: Cell, rank: int | None, port: int) -> dict[str, str]:
    """rank None: this process's own place among the ranks, as its launcher says it."""
    environment = {
        # glibc keeps freed blocks below a threshold that grows with use: resident memory then says how the heap broke
        # up (0.4 to 1 GiB for one 4-bit model), not what was needed. Fixed, large blocks go back at once, everywhere
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if cell.threads is not None:
        environment["OMP_NUM_THREADS"] = str(cell.threads)
    if cell.ranks > 1 and rank is not None:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(cell.ranks)}
        environment |= {"LOCAL_WORLD_SIZE": str(cell.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
