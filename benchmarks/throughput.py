"""Tokens a second and peak memory of a grid of cells, each in a process of its own, peers beside it in the same run.

    python -m benchmarks.throughput --preset cpu --out benchmarks/results/cpu
    python -m benchmarks.throughput --preset gpu --shape 8b --layers 8 --out OUT
    python -m benchmarks.throughput --preset scaling --shape 8b --ranks 1 2 4 8 --out OUT
    torchrun ... -m benchmarks.throughput --preset scaling --shape 8b --ranks 16 --out OUT   (one process a rank)

Cells of a group are loaded together and step in turns (small models on a CPU), or run one after another (GPUs). A cell
that fails, does not fit or takes too long says so in its raw file; the others go on. Every raw file holds the samples
and where they come from. `python -m benchmarks.report` makes the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora_dist.errors import UserError

from . import cells, figures, inputs, peers, provenance, work
from .cells import Cell, Group, Preset

ROOT = provenance.ROOT


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


class Run:
    """One call of this command: where its files are and what its numbers are traced to."""

    def __init__(
        self, preset: Preset, out: Path, scratch: Path, origin: dict[str, Any], *, resume: bool, joined: bool
    ) -> None:
        self.preset, self.out, self.scratch, self.origin = preset, out, scratch, origin
        self.resume, self.joined = resume, joined
        self.is_main = not joined or os.environ["RANK"] == "0"  # whose results are the run's
        self.workers: list[Worker] = []  # all that were started
        out.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)

    def group(self, group: Group) -> list[dict[str, Any]]:
        """Measures the cells of a group and writes their raw files."""
        results = list(self._in_turns(group) if group.in_turns else self._one_by_one(group))
        self._check_same_work(results)
        gemm = next((result for result in results if result["cell"]["engine"] == "gemm"), None)
        for result in results:
            self._write(group, result, gemm)
            if self.is_main:
                print(f"{result['name']}: {figures.one_line(result)}", flush=True)
        return results

    def _write(self, group: Group, result: dict[str, Any], gemm: dict[str, Any] | None) -> None:
        result["group"] = group.title
        result["figures"] = figures.of(result, gemm, self.origin["device"])
        result.setdefault("provenance", self.origin)
        path = self.out / f"{result['name']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")

    def _earlier(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result of this very code, where the run goes on after an earlier one."""
        path = self.out / f"{cell.name}.json"
        if not self.resume or not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        is_of_this_code = found["provenance"]["code_hash"] == self.origin["code_hash"]
        return found if is_of_this_code and found["status"] in ("ok", "oom") else None

    # --- how cells are run ---

    def _in_turns(self, group: Group) -> list[dict[str, Any]]:
        workers: list[Worker] = []
        skipped = []
        for cell in group.cells:
            if reason := peers.missing(cell):
                skipped.append(_without_result(cell, "missing", reason))
                continue
            worker = self._start(cell, turns=True)
            worker.ask(None)  # loaded and warm, or ended
            worker.deadline = time.monotonic() + self.preset.timeout_seconds
            workers.append(worker)
        steps = -(-self.preset.steps // self.preset.turns)
        for turn in range(self.preset.turns):
            # there and back, so that a drift of the machine does not favour the first or the last
            for worker in workers if turn % 2 == 0 else workers[::-1]:
                if worker.is_running:
                    worker.deadline = time.monotonic() + self.preset.timeout_seconds
                    worker.ask(f"turn {steps}")
        results = []
        for worker in workers:
            if worker.is_running:
                with contextlib.suppress(BrokenPipeError):
                    assert worker.processes[0].stdin is not None
                    worker.processes[0].stdin.write("finish\n")
                    worker.processes[0].stdin.flush()
            worker.deadline = time.monotonic() + self.preset.timeout_seconds
            worker.wait()
            results.append(self._collect(worker))
        return results + skipped

    def _one_by_one(self, group: Group) -> Iterator[dict[str, Any]]:
        gemm = None
        for cell in group.cells:
            result = self._earlier(cell)
            if result is None and (reason := peers.missing(cell) or inputs.too_large(cell, self.scratch)):
                result = _without_result(cell, "missing", reason)
            if result is None:
                worker = self._start(cell, turns=False)
                worker.wait()
                result = self._collect(worker)
            gemm = result if cell.engine == "gemm" else gemm
            self._write(group, result, gemm)  # at once: a time limit keeps what is there
            yield result

    def _start(self, cell: Cell, turns: bool) -> Worker:
        place = f"-rank{os.environ['RANK']}" if self.joined else ""
        folder = self.scratch / "cells" / f"{cell.name}{place}"
        folder.mkdir(parents=True, exist_ok=True)
        preset = self.preset
        num_steps = preset.warmup_steps + preset.steps + preset.turns + preset.instrumented_steps + 1
        for left in ("result.json", "result.gradients"):  # of an earlier run with this scratch folder
            (folder / left).unlink(missing_ok=True)
        spec = {
            "cell": cell.as_dict(),
            "out": str(folder / "result.json"),
            "scratch": str(folder),
            "warmup_steps": preset.warmup_steps,
            "steps": preset.steps,
            "instrumented_steps": preset.instrumented_steps,
            **inputs.prepare(cell, self.scratch, num_steps),
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        command = [sys.executable, "-m", "benchmarks.worker", str(folder / "spec.json"), *(["--turns"] * turns)]
        port = _free_port()
        processes = []
        log = folder / "log.txt"
        for rank in range(1 if self.joined else cell.ranks):
            with log.open("a") as stderr:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=_environment(cell, None if self.joined else rank, port),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                        start_new_session=True,
                    )
                )
        worker = Worker(cell, folder / "result.json", log, processes, time.monotonic() + preset.timeout_seconds)
        self.workers.append(worker)
        return worker

    def _collect(self, worker: Worker) -> dict[str, Any]:
        worker.kill()
        if worker.out.exists():
            result: dict[str, Any] = json.loads(worker.out.read_text())
        else:
            code = worker.processes[0].returncode
            # the kernel ends a process that takes the host's last memory with SIGKILL
            status = "timeout" if worker.has_timed_out else "oom" if code == -signal.SIGKILL else "failed"
            tail = worker.log.read_text()[-1500:]
            result = _without_result(worker.cell, status, f"ended with code {code}: {tail}")
        facts = inputs.facts_of(worker.cell, self.scratch)
        result["dataset"] = facts
        result["plan"] = inputs.planned(worker.cell, self.scratch)
        return result

    def _check_same_work(self, results: list[dict[str, Any]]) -> None:
        """Compares every cell with this package's cell of the same method, data and shape."""
        references: dict[Any, dict[str, Any]] = {}
        for result in results:
            cell = result["cell"]
            if (
                cell["engine"] == "gemm"
                or result["status"] != "ok"
                or (cell["engine"] == "ours" and not cell["packing"])
            ):
                continue
            keys = ("method", "shape", "layers", "row_tokens", "rows_per_step", "data")
            key = tuple(cell[name] for name in keys)
            reference = references.setdefault(key, result) if cell["engine"] == "ours" else references.get(key)
            if reference is None:
                result["same_work"] = None
                continue
            result["same_work"] = work.compare(
                reference, result, self._gradients(reference["name"]), self._gradients(result["name"])
            )

    def _gradients(self, name: str) -> dict[str, torch.Tensor]:
        path = self.scratch / "cells" / name / "result.gradients"
        return load_file(path) if path.exists() else {}


def _without_result(cell: Cell, status: str, reason: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"cell": cell.as_dict(), "name": cell.name, "status": status, "reason": reason}
    return {**empty, "samples": [], "phases": {}, "memory": {}, "first_loss": None}


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


def run(
    preset: Preset,
    out: Path,
    *,
    command: str,
    only: str = "",
    scratch: Path | None = None,
    resume: bool = False,
    joined: bool = False,
) -> list[dict[str, Any]]:
    """Measures a preset; all results. Raw files are in `out`. resume: cells of this code that are there are kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin = provenance.collect(command, device)
    own = Path(tempfile.mkdtemp(prefix="benchmark-")) if scratch is None else scratch
    measuring = Run(preset, out, own, origin, resume=resume, joined=joined)
    try:
        results = []
        for group in preset.groups:
            chosen = tuple(cell for cell in group.cells if only in cell.name)
            if chosen:
                results += measuring.group(Group(chosen, group.in_turns, group.title))
        return results
    finally:
        for worker in measuring.workers:
            worker.kill()
        if scratch is None:
            shutil.rmtree(own, ignore_errors=True)


def run_as_rank(preset: Preset, out: Path, *, command: str, scratch: Path) -> None:
    """This process is one of the ranks that a launcher started (torchrun, srun): all measure the same cells together.

    Each rank starts the cell in a process of its own with its place among the ranks. Inputs are made by the first rank
    of each node, below `scratch`/node; raw files are written by rank 0.
    """
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ["WORLD_SIZE"])
    job = os.environ.get("TORCHELASTIC_RUN_ID", os.environ.get("SLURM_JOB_ID", "job"))
    own = scratch / f"{socket.gethostname()}-{job}"
    own.mkdir(parents=True, exist_ok=True)
    cells_here = [cell for group in preset.groups for cell in group.cells if cell.ranks == world_size]
    if not cells_here:
        raise UserError(f"no cell of this preset has {world_size} ranks; give --ranks {world_size}")
    num_steps = preset.warmup_steps + preset.steps + preset.turns + preset.instrumented_steps + 1
    for cell in cells_here:
        made = own / f"{cell.name}.made"
        if local_rank == 0:
            inputs.prepare(cell, own, num_steps)
            made.touch()
        while not made.exists():
            time.sleep(0.2)
    chosen = replace(preset, groups=(Group(tuple(cells_here), False, "ranks"),))
    where = out if rank == 0 else own / f"rank-{rank}"
    if rank != 0:  # every rank has its own folder of logs and results; only rank 0's results are kept
        where.mkdir(parents=True, exist_ok=True)
    run(chosen, where, command=command, scratch=own, joined=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "cpu", "cpu-all", "gpu", "peaks", "scaling"), default="cpu")
    parser.add_argument("--shape", default="1b", help="gpu, scaling: one of benchmarks.shapes")
    parser.add_argument("--layers", type=int, help="gpu, scaling: only the first N layers of the shape")
    parser.add_argument("--row-tokens", type=int, default=2048, help="gpu, scaling: tokens of a row")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="scaling: numbers of ranks")
    parser.add_argument("--strategies", nargs="+", default=["ddp"], help="scaling: strategy.name of the config")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--scratch", type=Path, help="folder for models and data, kept; default: a temporary one")
    parser.add_argument("--resume", action="store_true", help="keep cells in --out that this very code has measured")
    parser.add_argument(
        "--ratios", type=Path, help="tiny: also record the ratios that the regression test compares with"
    )
    parser.add_argument("--allow-dirty", action="store_true", help="measure code that is no commit; the result says so")
    arguments = parser.parse_args()
    preset = {
        "tiny": cells.tiny,
        "cpu": cells.cpu,
        "cpu-all": cells.cpu_all,
        "peaks": cells.peaks,
        "gpu": lambda: cells.gpu(arguments.shape, arguments.layers, arguments.row_tokens),
        "scaling": lambda: cells.scaling(
            arguments.shape,
            arguments.layers,
            tuple(arguments.ranks),
            tuple(arguments.strategies),
            arguments.row_tokens,
        ),
    }[arguments.preset]()
    try:
        provenance.require_clean(arguments.allow_dirty)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cells end with this process
    started = time.monotonic()
    command = provenance.this_command("benchmarks.throughput")
    if "WORLD_SIZE" in os.environ:
        shared = arguments.scratch or Path(tempfile.gettempdir()) / "benchmark-ranks"
        run_as_rank(preset, arguments.out, command=command, scratch=shared)
        return
    results = run(
        preset,
        arguments.out,
        command=command,
        only=arguments.only,
        scratch=arguments.scratch,
        resume=arguments.resume,
    )
    if arguments.ratios is not None:
        origin = provenance.collect(command, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        content = {"benchmark": "ratios", "provenance": origin, **figures.ratios(results)}
        arguments.ratios.write_text(json.dumps(content, indent=1) + "\n")
    counts = Counter(result["status"] for result in results)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{len(results)} cells ({summary}) in {time.monotonic() - started:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
