"""The ranks of a run as processes without a launcher: each must react to another's death on its own.

Forked from a server that has done the imports, so that a run takes about a second; each runs the real command line.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.ranks import process_context, redirect
from helpers.renderer import stand_by
from helpers.two_hosts import ADDRESSES, Hosts, enter_host

Fault = dict[str, Any]  # as tests/faults/sitecustomize.py explains


@dataclass
class Ended:
    """How one rank's process ended."""

    code: int  # exit code; negative: the signal
    output: str
    at: float  # time.monotonic()


class Crew:
    """Context manager: ranks that train a config. `late_seconds`: how much later the last one starts. `hosts`: each
    rank on one of them.
    """

    def __init__(
        self,
        config: Path,
        folder: Path,
        *faults: Fault,
        ranks: int = 2,
        late_seconds: float = 0.0,
        job: str = "",
        hosts: Hosts | None = None,
    ) -> None:
        context = process_context()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder.mkdir(exist_ok=True)
        places = hosts.pids if hosts is not None else [0] * ranks
        self._logs = [folder / f"rank-{rank}-{time.monotonic_ns()}.log" for rank in range(ranks)]
        self.processes = [
            context.Process(
                target=_main,
                args=(rank, ranks, port, str(config), str(self._logs[rank]), faults, job, places[rank]),
            )
            for rank in range(ranks)
        ]
        for rank, process in enumerate(self.processes):
            if rank == ranks - 1 and late_seconds:
                self.processes[0].join(late_seconds)
                assert self.processes[0].is_alive(), f"the first rank did not wait\n{self.output()}"
            process.start()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, timeout: float = 120) -> list[Ended]:
        """Waits until all have exited; AssertionError with their output if they do not."""
        ends: dict[int, float] = {}
        deadline = time.monotonic() + timeout
        while len(ends) < len(self.processes):
            for rank, process in enumerate(self.processes):
                if rank not in ends and not process.is_alive():
                    ends[rank] = time.monotonic()
            if time.monotonic() > deadline:
                self.print_stacks()
                raise AssertionError(f"only ranks {sorted(ends)} exited within {timeout} s\n{self.output()}")
            time.sleep(0.02)
        return [
            Ended(process.exitcode or 0, log.read_text(), ends[rank])
            for rank, (process, log) in enumerate(zip(self.processes, self._logs))
        ]

    def wait_for_rank(self, rank: int, timeout: float = 120) -> Ended:
        self.processes[rank].join(timeout)
        if self.processes[rank].is_alive():
            self.print_stacks()
            raise AssertionError(f"rank {rank} is still running after {timeout} s\n{self.output()}")
        return Ended(self.processes[rank].exitcode or 0, self._logs[rank].read_text(), time.monotonic())

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid or 0, number)

    def print_stacks(self) -> None:
        """Ends the ranks that still run, each with the stacks of its threads in its output."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGABRT)
                process.join(10)

    def output(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in self._logs if log.exists())


def _main(
    rank: int, ranks: int, port: int, config: str, log: str, faults: tuple[Fault, ...], job: str, host: int
) -> None:
    if host:
        enter_host(host)
    redirect(log, log)
    faulthandler.enable()  # see `print_stacks`
    # as for all ranks of tests: accelerate would choose it by the ranks of a node, and sums on more threads are others
    os.environ["OMP_NUM_THREADS"] = "1"
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if host:
            os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": ADDRESSES[0]}
    if job:
        os.environ["SLURM_JOB_ID"] = job
    import torch

    torch.set_num_threads(1)
    if rank == 0:
        stand_by()
    sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
    kit = importlib.import_module("sitecustomize")
    for module in {where for where, _ in kit.PLACES.values()}:
        kit.apply(importlib.import_module(module), faults)
    from qlora_dist.commands import invoke

    code = invoke(["train", config])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
