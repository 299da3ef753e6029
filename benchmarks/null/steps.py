"""Points: a few training steps of one configuration each on the null device, with what they allocate and launch.

`measure` is called from any interpreter; it starts this module in the one that sees the device, with the patches of
tests/null (plausible values for what the trainer reads back). One process runs all points of a call, one after another:
starting it takes longer than most of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dist.cluster.stop_signal import StopSignal
from qlora_dist.config import parse_config
from qlora_dist.console import Console
from qlora_dist.errors import UserError
from qlora_dist.memory import MemoryPlan, plan_memory
from qlora_dist.memory.read_shapes import read_shapes
from qlora_dist.train import step as training
from qlora_dist.train.metrics import peak_bytes, restart_peak
from qlora_dist.train.run import join_ranks
from qlora_dist.train.setup_data import build_data
from qlora_dist.train.setup_model import build_model

from .. import provenance
from ..repro_65b import write_inputs
from ..shapes import config_json, shape_of
from . import counters

PATCHES = provenance.ROOT / "tests" / "null" / "patches"
PYTHON = provenance.ROOT / "build" / "null" / "python"  # `make build/null/python`
NUM_STEPS = 3  # the first creates the optimizer states


@dataclass(frozen=True)
class Point:
    """One configuration: QLoRA with NF4 and double quantization, one micro-batch per step, every row full."""

    shape: str
    row_tokens: int
    recompute: str = "full"  # or none, or half: the first half of the layers
    layers: int | None = None  # None: all layers of the shape
    micro_rows: int = 1
    rank: int = 16
    optimizer: str = "adamw"
    offload: bool = False  # of activations

    @property
    def name(self) -> str:
        depth = "" if self.layers is None else f" {self.layers} layers"
        offload = " offload" if self.offload else ""
        return (
            f"{self.shape}{depth} {self.micro_rows} x {self.row_tokens} r {self.rank} {self.optimizer} "
            f"recompute {self.recompute}{offload}"
        )

    @property
    def recomputed_layers(self) -> int:
        layers = shape_of(self.shape, self.layers).layers
        return {"none": 0, "half": layers // 2, "full": layers}[self.recompute]

    def config(self, folder: Path) -> dict[str, Any]:
        """The run config that a user would write; its inputs are in `folder`."""
        recompute = self.recomputed_layers if self.recompute == "half" else self.recompute
        return {
            "run_dir": str(folder / "run"),
            "model": {"name": str(folder / "model"), "weights": "random"},
            "lora": {"rank": self.rank, "alpha": 16},
            "data": {
                "train": [{"path": str(folder / "rows.jsonl"), "format": "tokens"}],
                "row_tokens": self.row_tokens,
                "cache_dir": str(folder / "cache"),
                "num_workers": 1,
            },
            "batch": {"rows_per_step": self.micro_rows, "micro_rows": self.micro_rows},
            "optim": {"name": self.optimizer},
            "train": {"steps": 1000},
            "memory": {"recompute": recompute, "offload_activations": self.offload},
            "logging": {"trackers": []},
        }


def environment(gib: float | None = None) -> dict[str, str]:
    """For a process on the null device; `gib`: the card's size."""
    paths = [str(PATCHES), str(provenance.ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({} if gib is None else {"NULL_GPU_GIB": str(gib)}),
    }


def interpreter() -> str:
    """The interpreter that sees the null device. Raises UserError if there is none."""
    path = Path(os.environ.get("QLORA_DIST_NULL_PYTHON", PYTHON))
    if not path.exists():
        raise UserError(f"no null device: {path} does not exist; make build/null/python, or set QLORA_DIST_NULL_PYTHON")
    return str(path)


def measure(points: Iterable[Point], work: Path, *, gib: float = 1000.0) -> Iterator[dict[str, Any]]:
    """Runs points in one process; yields each result as it comes. `work` keeps the inputs; gib: the card's size.

    Raises UserError with the process's last lines if it ends early.
    """
    work.mkdir(parents=True, exist_ok=True)
    specs, log = json.dumps([dataclasses.asdict(point) for point in points]), work / "log.txt"
    command = [interpreter(), "-m", "benchmarks.null.steps", str(work)]
    with log.open("w") as errors, subprocess.Popen(
        command, env=environment(gib), cwd=provenance.ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(specs)
            process.stdin.close()
            yield from map(json.loads, process.stdout)
        except GeneratorExit:  # the caller wants no more
            process.kill()
            raise
    if process.returncode:
        raise UserError(f"a point on the null device ended with code {process.returncode}\n{log.read_text()[-3000:]}")


# --- in the process on the null device --------------------------------------------------------------------------------


def run(point: Point, work: Path) -> dict[str, Any]:
    """Builds and trains the point in this process, as `qlora_dist.train.train` does, without saving."""
    inputs = work / f"{point.shape}-{point.layers}-{point.row_tokens}"
    _write_inputs(point, inputs)
    config = parse_config(point.config(inputs))
    steps: list[dict[str, Any]] = []
    with StopSignal() as stop, join_ranks(config, stop, Console()) as world:
        held = torch.cuda.memory_allocated()  # an earlier point's cuBLAS workspaces
        plan = plan_memory(config, read_shapes(config.model.name, None), world_size=1, device_bytes=None)
        data = build_data(config, world)
        started = time.process_time()
        model = build_model(config, world)
        build_seconds = time.process_time() - started
        build_peak = restart_peak(world.device)
        for index, rows in enumerate(data.loader.iterate(0, NUM_STEPS, pin_memory=True)):
            counters.reset()  # sums of FLOPs stay exact
            before, wall = counters.read(), time.perf_counter()
            training.train_step(world, model, rows, step=index, seed=0, lr=1e-4, stop_requested=False)
            after, seconds = counters.read(), time.perf_counter() - wall
            counted = {name: after[name] - before[name] for name in after}
            steps.append({"tokens": rows.num_tokens, "labels": rows.num_labels, "seconds": seconds, **counted})
        peak, reserved = peak_bytes(world.device), torch.cuda.max_memory_reserved(world.device)
    return {
        "point": dataclasses.asdict(point),
        "name": point.name,
        "provenance": provenance.collect(provenance.this_command("benchmarks.null.steps"), torch.device("cuda", 0)),
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "held_before_bytes": held,
        "build_peak_bytes": build_peak,
        **against_plan(plan, peak),
        "build_cpu_seconds": build_seconds,
        "step_cpu_seconds": statistics.median(step["cpu_seconds"] for step in steps[1:]),
        "steps": steps,
    }


def against_plan(plan: MemoryPlan, peak: int) -> dict[str, Any]:
    """What the plan counts as tensors, and its error, relative to the allocator's peak."""
    return {
        "planned_bytes": plan.tensor_bytes,
        "plan_error": plan.tensor_bytes / peak - 1,
        "planned_peak_at": plan.peak_at,
        "plan_items": {name: item.size for name, item in plan.items.items() if item.is_tensor},
    }


def _write_inputs(point: Point, folder: Path) -> None:
    if not (folder / "ready").exists():
        write_inputs(folder, config_json(shape_of(point.shape, point.layers)), point.row_tokens, 8)
        (folder / "ready").touch()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the libraries' output apart from the answers
    for spec in json.load(sys.stdin):
        answers.write(json.dumps(run(Point(**spec), Path(sys.argv[1]))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
