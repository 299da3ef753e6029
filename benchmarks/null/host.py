"""Host time of a training step: this package beside TRL and transformers' Trainer with PEFT, on the null device.

    .venv/bin/python -m benchmarks.null.host --out benchmarks/results/null [--layers N]

A device that computes nothing never makes the host wait, so a step takes what Python, autograd and the dispatch of
kernels take: the least that a step can take on any device. The engines of a row are loaded together and step in turns,
each with the same model files (zeros), data and optimizer. CPU seconds (of all threads of the engine's process) are
less affected by other load on the machine than seconds; the least of each is reported next to the median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from qlora_dist.errors import UserError

from .. import provenance
from ..cells import Cell
from ..shapes import shape_of
from .hollow import write_hollow_model
from .steps import Counters, environment, interpreter

ROW_TOKENS = 2048
WARMUP_STEPS, TURNS, STEPS_PER_TURN = 2, 5, 3
START_SECONDS = 900.0


def groups(shape: str, layers: int | None) -> list[list[Cell]]:
    """Cells that step in turns: the same tokens and recomputation, three engines."""
    found = []
    for rows in (1, 4):
        for recompute in ("none", "full"):
            ours = Cell("ours", "nf4-dq", shape, ROW_TOKENS, layers=layers, data="full", rows_per_step=rows,
                        micro_rows=rows, recompute=recompute)  # fmt: skip
            trl = replace(ours, engine="trl", variant="best")
            found.append([ours, trl, replace(trl, engine="trainer")])
    return found


# --- the process of one engine ----------------------------------------------------------------------------------------


class Clock:
    """Stands in for the conductor of `benchmarks.worker`: takes turns, and measures each step on the host."""

    is_instrumented = False

    def __init__(self, orders: IO[str], answers: IO[str]) -> None:
        self._orders, self._answers = orders, answers
        self._counters, self._left, self._is_warm = Counters(), WARMUP_STEPS, False
        self._mark = (0.0, 0.0)
        self.phases: list[dict[str, float]] = []
        self.samples: list[dict[str, Any]] = []

    def start(self) -> None:
        self._restart()

    def phase(self, name: str, excluding: tuple[str, ...] = ()) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def add(self, name: str, seconds: float) -> None:
        pass

    def step_done(self, num_tokens: int, num_labels: int, loss: float | None = None) -> bool:
        """After a step. False: stop."""
        seconds, cpu = time.perf_counter() - self._mark[0], time.process_time() - self._mark[1]
        if self._is_warm:
            counts = self._counters.read()
            self.samples.append({"tokens": num_tokens, "seconds": seconds, "cpu_seconds": cpu, **counts})
        self._left -= 1
        if not self._left:
            self._is_warm = True
            self._answers.write("done\n")
            self._answers.flush()
            self._left = int(self._orders.readline() or "0")
        self._restart()
        return self._left > 0

    def _restart(self) -> None:
        self._counters.reset()
        self._mark = (time.perf_counter(), time.process_time())


class _NoWatch:
    def imported(self) -> None: ...

    def loaded(self) -> None: ...


def run_engine(spec: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """One cell until the clock stops it; returns its raw result."""
    import torch

    from .. import ours, peers

    cell, model, data = Cell(**spec["cell"]), Path(spec["model"]), Path(spec["data"])
    scratch = Path(spec["out"]).parent / cell.name
    if cell.engine == "ours":
        ours.run(cell, model, data, scratch, clock, _NoWatch())  # type: ignore[arg-type]
    else:
        documents = [[list(range(cell.micro_rows))] for _ in range(WARMUP_STEPS + TURNS * STEPS_PER_TURN + 1)]
        peers.run(cell, model, data, scratch, clock, _NoWatch(), documents, {})  # type: ignore[arg-type]
    origin = provenance.collect(provenance.this_command("benchmarks.null.host"), torch.device("cuda", 0))
    memory = {"peak_bytes": torch.cuda.max_memory_allocated()}
    return {"cell": cell.as_dict(), "name": cell.name, "label": cell.label, "samples": clock.samples,
            "origin": origin, **memory}  # fmt: skip


def engine_main(path: Path) -> None:
    spec = json.loads(path.read_text())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the libraries' output apart from the answers
    result = run_engine(spec, Clock(sys.stdin, answers))
    Path(spec["out"]).write_text(json.dumps(result))


# --- the process that orders the turns --------------------------------------------------------------------------------


def measure_group(cells: list[Cell], model: Path, data: Path, work: Path) -> list[dict[str, Any]]:
    """Loads the engines one after another, then lets them step in turns. Raises UserError with a failed one's log."""
    running = [_start(cell, model, data, work) for cell in cells]
    try:
        for _, process, log in running:
            _await(process, log)
        for turn in range(TURNS):
            # forward, then backward: drift of the machine favours neither the first nor the last
            for _, process, log in running if turn % 2 == 0 else running[::-1]:
                _order(process, STEPS_PER_TURN)
                _await(process, log)
        for _, process, _ in running:
            _order(process, 0)
        for cell, process, log in running:
            if process.wait(START_SECONDS):
                raise UserError(f"{cell.name}: exit code {process.returncode}\n{log.read_text()[-3000:]}")
        return [json.loads((work / f"{cell.name}.json").read_text()) for cell in cells]
    finally:
        for _, process, _ in running:
            process.kill()
            process.wait()


def _start(cell: Cell, model: Path, data: Path, work: Path) -> tuple[Cell, subprocess.Popen[str], Path]:
    spec, log = work / f"{cell.name}.spec", work / f"{cell.name}.log"
    out = work / f"{cell.name}.json"
    spec.write_text(json.dumps({"cell": cell.as_dict(), "model": str(model), "data": str(data), "out": str(out)}))
    with log.open("w") as errors:
        process = subprocess.Popen(
            [interpreter(), "-m", "benchmarks.null.host", "--engine", str(spec)],
            env=environment(1000.0) | {"OMP_NUM_THREADS": "1"}, cwd=provenance.ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    return cell, process, log


def _order(process: subprocess.Popen[str], steps: int) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()


def _await(process: subprocess.Popen[str], log: Path) -> None:
    assert process.stdout is not None
    if not process.stdout.readline():
        raise UserError(f"an engine ended early\n{log.read_text()[-3000:]}")


def summarized(result: dict[str, Any]) -> dict[str, Any]:
    """A raw result with the figures of its samples."""
    samples = result["samples"]
    figures = {
        f"{name}_{kind}": of(sample[name] for sample in samples)
        for name in ("seconds", "cpu_seconds")
        for kind, of in (("median", statistics.median), ("least", min))
    }
    counts = {name: statistics.median_low(s[name] for s in samples) for name in ("launches", "synchronizations")}
    return result | figures | counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=provenance.ROOT / "benchmarks" / "results" / "null")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="Folder for the inputs (default: a temporary one).")
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    if arguments.engine is not None:
        engine_main(arguments.engine)
        return
    try:
        provenance.require_clean(arguments.allow_dirty)
        write(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def write(arguments: argparse.Namespace) -> None:
    """Measures all groups; writes the raw file after each."""
    from ..dataset import write_dataset

    work = arguments.work or Path(tempfile.mkdtemp(prefix="null-host-"))
    work.mkdir(parents=True, exist_ok=True)
    command, results = provenance.this_command("benchmarks.null.host"), []
    shape = shape_of(arguments.shape, arguments.layers)
    try:
        model, data = write_hollow_model(work / "model", shape), work / "data"
        write_dataset(data, model, kind="full", row_tokens=ROW_TOKENS, vocabulary=shape.vocabulary)
        for cells in groups(arguments.shape, arguments.layers):
            results += [summarized(result) for result in measure_group(cells, model, data, work)]
            origin = results[0]["origin"] | {"command": command}
            content = {"benchmark": "null_host", "provenance": origin, "results": results}
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "host.json").write_text(json.dumps(content, indent=1) + "\n")
            for one in results[-len(cells) :]:
                print(f"{one['name']}: cpu {one['cpu_seconds_median']:.3f} s, wall {one['seconds_median']:.3f} s, "
                      f"{one['launches']} launches", flush=True)  # fmt: skip
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
