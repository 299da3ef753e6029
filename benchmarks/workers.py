"""The processes of a cell, as seen by the process that runs the grid: start, orders, time limits, exit."""

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
        """Sends an order (None: only wait) and waits for the answer. False: this worker takes no more turns."""
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
        """Waits until all its processes have exited or its time is up."""
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
    """Kills a worker that does not answer in time: its pipe then closes and the read returns."""

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
    """One process per rank of the cell; joined: only one, with this process's own rank. stderr goes to `log`."""
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
    """rank None: this process's own rank, as set by its launcher."""
    environment = {
        # glibc keeps freed blocks below a threshold that grows with use: resident memory then measures fragmentation
        # (0.4 to 1 GiB for one 4-bit model), not need. With a fixed threshold large blocks are returned at once
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
