"""One cell in its own process: python -m benchmarks.worker SPEC.json [--turns]

SPEC has the cell and its folders; the result is written to its `out`. With --turns the parent orders the steps (see
conductor), otherwise all run in one go. Any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT may start it on several ranks. A cell that runs out of memory, or fails, has that in its result and exits
with 0; only a killed process leaves no result.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import ctypes  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import IO, Any  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from . import memory, nvml, peers, provenance  # noqa: E402
from .cells import Cell  # noqa: E402
from .conductor import Conductor, host_counters  # noqa: E402
from .null import counters  # noqa: E402
from .shapes import shape_of  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - STARTED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--turns", action="store_true")
    arguments = parser.parse_args()
    _end_with_parent()
    spec = json.loads(arguments.spec.read_text())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the libraries' output apart from the answers
    result = measure(spec, sys.stdin if arguments.turns else None, answers if arguments.turns else None)
    if int(os.environ.get("RANK", "0")) == 0:
        out = Path(spec["out"])
        out.with_suffix(".part").write_text(json.dumps(result))
        out.with_suffix(".part").rename(out)


def _end_with_parent() -> None:
    """Linux: this process is killed when its parent exits, however that happens."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def measure(spec: dict[str, Any], orders: IO[str] | None, answers: IO[str] | None) -> dict[str, Any]:
    """Runs the cell of a spec; returns its raw result without provenance."""
    cell = Cell(**spec["cell"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if cell.threads is not None:
        torch.set_num_threads(cell.threads)
    watch = memory.MemoryWatch(device)
    conductor = Conductor(
        device,
        warmup_steps=spec["warmup_steps"],
        steps=spec["steps"],
        instrumented_steps=spec["instrumented_steps"],
        profile_steps=0 if cell.engine == "gemm" else spec.get("profile_steps", 0),
        orders=orders,
        answers=answers,
        counters=counters.read if counters.IS_NULL else host_counters,
    )
    before = provenance.device_state(device)  # nothing is loaded yet: only the context is in use
    cap: dict[str, int] = {}
    energy = nvml.energy_joules(device.index or 0) if device.type == "cuda" else None
    try:
        if cell.cap_gib is not None:
            cap = memory.set_cap(int(cell.cap_gib * memory.GIB), device)
        facts = _run(cell, spec, conductor, watch, device)
        status, reason = "ok", ""
    except Exception as error:
        facts = {}
        status = "oom" if memory.is_out_of_memory(error) else "failed"
        reason = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    first = facts.pop("first", {})
    if first.get("gradients"):
        save_file(first["gradients"], Path(spec["out"]).with_suffix(".gradients"))
    after = conductor.state_after or provenance.device_state(device)  # the latter if it did not get that far
    used = None if energy is None else (nvml.energy_joules(device.index or 0) or energy) - energy
    return {
        "cell": cell.as_dict(),
        "name": cell.name,
        "status": status,
        "reason": reason[:2000],
        "first_loss": first.get("loss"),
        "samples": conductor.samples,
        "turns": conductor.turns,
        "phases": conductor.split(),
        "phase_samples": conductor.phases,
        "startup_seconds": conductor.startup_seconds + IMPORT_SECONDS,  # from the first line of this file
        "memory": watch.result() | _of_device(before, after) | cap,
        "device_state": {"before": before, "after": after},
        "profile": conductor.profile,
        "energy_joules": used,
        "num_threads": torch.get_num_threads(),
        **facts,
    }


def _of_device(before: Any, after: Any) -> dict[str, int | None]:
    """Device memory outside the allocator. Used bytes are from the timed steps: a profiler takes device memory too."""
    if before is None:
        return {}
    return {"context_bytes": before["context_bytes"], "device_used_bytes": after["device_used_bytes"]}


def _run(cell: Cell, spec: dict[str, Any], conductor: Conductor, watch: Any, device: torch.device) -> dict[str, Any]:
    model, data, scratch = (Path(spec[name]) for name in ("model", "data", "scratch"))
    if cell.engine == "gemm":
        return _run_gemm(cell, conductor, watch, device)
    if cell.engine == "ours":
        from . import ours

        return ours.run(cell, model, data, scratch, conductor, watch)
    initial = {} if cell.is_full else load_file(spec["initial"])
    return peers.run(cell, model, data, scratch, conductor, watch, spec["document_steps"], initial)


def _run_gemm(cell: Cell, conductor: Conductor, watch: Any, device: torch.device) -> dict[str, Any]:
    """The matrix products of one decoder layer and the head, nothing else: the rate that an ideal step could reach."""
    shape = shape_of(cell.shape, cell.layers)
    tokens = cell.row_tokens * cell.micro_rows
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[cell.method]
    sizes = [*shape.matrices().values(), (shape.vocabulary, shape.hidden)]
    generator = torch.Generator().manual_seed(0)
    operands = [
        (torch.randn(tokens, i, generator=generator).to(device, dtype),
         torch.randn(o, i, generator=generator).to(device, dtype))
        for o, i in sizes
    ]  # fmt: skip
    watch.imported()
    watch.loaded()
    conductor.start()
    flops = 2 * tokens * sum(o * i for o, i in sizes)
    with torch.no_grad():
        while True:
            for x, w in operands:
                torch.nn.functional.linear(x, w)
            if not conductor.step_done(tokens, 0) or conductor.is_instrumented:
                break  # it has no phases
    return {"flops_per_step": flops, "dtype": cell.method, "tokens": tokens, "first": {}}


if __name__ == "__main__":
    main()
