"""Tokens per second and peak memory of a grid of cells, each in its own process, with peers in the same run.

    python -m benchmarks.throughput --preset cpu --out benchmarks/results/cpu
    python -m benchmarks.throughput --preset fair --shape 8b --layers 8 --profile --out OUT
    python -m benchmarks.throughput --preset gpu --shape 8b --layers 8 --out OUT
    python -m benchmarks.throughput --preset scaling --shape 8b --ranks 1 2 4 8 --out OUT
    torchrun ... -m benchmarks.throughput --preset scaling --shape 8b --ranks 16 --out OUT   (one process per rank)

Presets: tiny (for tests), cpu and cpu-all; on a GPU fair (one shape against its peers, few steps: minutes), depth (8B
at full depth, few steps), gpu (the wide grid: hours), peaks (planned and measured), scaling (ranks).

Cells of a group are loaded together and step in turns (small models on a CPU), or run one after another (GPUs). A cell
that fails, does not fit or takes too long has that in its raw file; the others continue. Every raw file has the samples
and their provenance. `python -m benchmarks.report` creates the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora_dist.errors import UserError

from . import cells, figures, inputs, peers, provenance, work, workers
from .cells import Cell, Group, Preset

PRESETS = ("tiny", "cpu", "cpu-all", "fair", "depth", "gpu", "peaks", "scaling")
PROFILED_STEPS = 3


class Run:
    """One invocation of this command: where its files are and the provenance of its results."""

    def __init__(
        self, preset: Preset, out: Path, scratch: Path, origin: dict[str, Any], *, resume: bool, joined: bool
    ) -> None:
        self.preset, self.out, self.scratch, self.origin = preset, out, scratch, origin
        self.resume, self.joined = resume, joined
        self.is_main = not joined or os.environ["RANK"] == "0"  # its results are the run's
        self.workers: list[workers.Worker] = []  # all workers started so far
        self.measured: dict[str, dict[str, Any]] = {}  # by the cell's name, from the groups so far
        out.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)

    def group(self, group: Group) -> list[dict[str, Any]]:
        """Measures the cells of a group and writes their raw files. A cell that an earlier group already measured is
        not measured again, only compared with."""
        known = [self.measured[cell.name] for cell in group.cells if cell.name in self.measured]
        cells_left = tuple(cell for cell in group.cells if cell.name not in self.measured)
        fresh = Group(cells_left, group.in_turns, group.title)
        results: list[dict[str, Any]] = []
        for result in self._in_turns(fresh) if group.in_turns else self._one_by_one(fresh):
            results.append(result)
            self._check_same_work([*known, *results])
            self._write(group, result, self._gemm([*known, *results]))  # at once, so that a time limit keeps it
            if self.is_main:
                print(f"{result['name']}: {figures.one_line(result)}", flush=True)
        gemm = self._gemm([*known, *results])
        self._check_same_work([*known, *results])
        for result in results:  # again, for results measured before their reference
            self._write(group, result, gemm)
        self.measured |= {result["name"]: result for result in results}
        return results

    @staticmethod
    def _gemm(results: list[dict[str, Any]]) -> dict[str, Any] | None:
        return next((result for result in results if result["cell"]["engine"] == "gemm"), None)

    def _write(self, group: Group, result: dict[str, Any], gemm: dict[str, Any] | None) -> None:
        result["group"] = group.title
        result["figures"] = figures.of(result, gemm, self.origin["device"])
        result.setdefault("provenance", self.origin)
        path = self.out / f"{result['name']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")

    def _earlier(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result from an earlier run of exactly this code, if this run resumes."""
        path = self.out / f"{cell.name}.json"
        if not self.resume or not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        is_of_this_code = found["provenance"]["code_hash"] == self.origin["code_hash"]
        return found if is_of_this_code and found["status"] in ("ok", "oom") else None

    # --- how cells are run ---

    def _in_turns(self, group: Group) -> list[dict[str, Any]]:
        running: list[workers.Worker] = []
        skipped = []
        for cell in group.cells:
            if reason := peers.missing(cell):
                skipped.append(_without_result(cell, "missing", reason))
                continue
            worker = self._start(cell, turns=True)
            worker.ask(None)  # loaded and warm, or ended
            worker.deadline = time.monotonic() + self.preset.timeout_seconds
            running.append(worker)
        steps = -(-self.preset.steps // self.preset.turns)
        for turn in range(self.preset.turns):
            # forward, then backward, so that drift of the machine favours neither the first nor the last
            for worker in running if turn % 2 == 0 else running[::-1]:
                if worker.is_running:
                    worker.deadline = time.monotonic() + self.preset.timeout_seconds
                    worker.ask(f"turn {steps}")
        results = []
        for worker in running:
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
        for cell in group.cells:
            result = self._earlier(cell)
            if result is None and (reason := peers.missing(cell) or inputs.too_large(cell, self.scratch)):
                result = _without_result(cell, "missing", reason)
            if result is None:
                worker = self._start(cell, turns=False)
                worker.wait()
                result = self._collect(worker)
            yield result

    def _start(self, cell: Cell, turns: bool) -> workers.Worker:
        place = f"-rank{os.environ['RANK']}" if self.joined else ""
        folder = self.scratch / "cells" / f"{cell.name}{place}"
        folder.mkdir(parents=True, exist_ok=True)
        preset = self.preset
        for stale in ("result.json", "result.gradients"):  # from an earlier run with this scratch folder
            (folder / stale).unlink(missing_ok=True)
        spec = {
            "cell": cell.as_dict(),
            "out": str(folder / "result.json"),
            "scratch": str(folder),
            "warmup_steps": preset.warmup_steps,
            "steps": preset.steps,
            "instrumented_steps": preset.instrumented_steps,
            "profile_steps": preset.profile_steps,
            **inputs.prepare(cell, self.scratch, preset.num_steps),
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        command = [sys.executable, "-m", "benchmarks.worker", str(folder / "spec.json"), *(["--turns"] * turns)]
        log = folder / "log.txt"
        processes = workers.start(cell, command, log, joined=self.joined)
        worker = workers.Worker(cell, folder / "result.json", log, processes, time.monotonic() + preset.timeout_seconds)
        self.workers.append(worker)
        return worker

    def _collect(self, worker: workers.Worker) -> dict[str, Any]:
        worker.kill()
        if worker.out.exists():
            result: dict[str, Any] = json.loads(worker.out.read_text())
        else:
            code = worker.processes[0].returncode
            # the kernel's OOM killer uses SIGKILL
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
    nothing: dict[str, Any] = {"samples": [], "phases": {}, "memory": {}, "first_loss": None, "profile": None}
    return {**empty, **nothing, "device_state": {"before": None, "after": None}}


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
    """Measures a preset; returns all results. Raw files go to `out`. resume: keeps cells measured by this same code."""
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
    """This process is one of the ranks that a launcher started (torchrun, srun); all measure the same cells together.

    Each rank starts the cell in a child process with its own rank. The first rank of each node creates the inputs,
    below `scratch`/node; rank 0 writes the raw files.
    """
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ["WORLD_SIZE"])
    job = os.environ.get("TORCHELASTIC_RUN_ID", os.environ.get("SLURM_JOB_ID", "job"))
    own = scratch / f"{socket.gethostname()}-{job}"
    own.mkdir(parents=True, exist_ok=True)
    cells_here = [cell for group in preset.groups for cell in group.cells if cell.ranks == world_size]
    if not cells_here:
        raise UserError(f"no cell of this preset has {world_size} ranks; give --ranks {world_size}")
    for cell in cells_here:
        ready = own / f"{cell.name}.made"
        if local_rank == 0:
            inputs.prepare(cell, own, preset.num_steps)
            ready.touch()
        while not ready.exists():
            time.sleep(0.2)
    chosen = replace(preset, groups=(Group(tuple(cells_here), False, "ranks"),))
    where = out if rank == 0 else own / f"rank-{rank}"
    if rank != 0:  # each rank has its own folder of logs and results; only rank 0's results are kept
        where.mkdir(parents=True, exist_ok=True)
    run(chosen, where, command=command, scratch=own, joined=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--shape", default="1b", help="fair, gpu, scaling: one of benchmarks.shapes")
    parser.add_argument("--layers", type=int, help="fair, gpu, scaling: only the first N layers of the shape")
    parser.add_argument("--row-tokens", type=int, default=2048, help="gpu, scaling: tokens per row")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="scaling: numbers of ranks")
    parser.add_argument("--strategies", nargs="+", default=["ddp"], help="scaling: strategy.name of the config")
    parser.add_argument(
        "--profile",
        action="store_true",
        help=f"run {PROFILED_STEPS} more steps of each cell under torch's profiler, for a kernel table in its raw file",
    )
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--scratch", type=Path, help="folder for models and data, kept; default: a temporary one")
    parser.add_argument("--resume", action="store_true", help="keep cells in --out that this same code has measured")
    parser.add_argument("--ratios", type=Path, help="tiny: also record the ratios for the regression test")
    parser.add_argument("--allow-dirty", action="store_true", help="measure uncommitted code; the results are marked")
    arguments = parser.parse_args()
    preset = {
        "tiny": cells.tiny,
        "cpu": cells.cpu,
        "cpu-all": cells.cpu_all,
        "peaks": cells.peaks,
        "fair": lambda: cells.fair(arguments.shape, arguments.layers),
        "depth": cells.depth,
        "gpu": lambda: cells.gpu(arguments.shape, arguments.layers, arguments.row_tokens),
        "scaling": lambda: cells.scaling(
            arguments.shape,
            arguments.layers,
            tuple(arguments.ranks),
            tuple(arguments.strategies),
            arguments.row_tokens,
        ),
    }[arguments.preset]()
    preset = replace(preset, profile_steps=PROFILED_STEPS if arguments.profile else 0)
    try:
        provenance.require_clean(arguments.allow_dirty)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cells exit with this process
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
