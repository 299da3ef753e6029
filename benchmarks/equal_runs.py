"""One config on one rank, on two ranks, and killed and started again: the losses of every step, laid over each other.

    python -m benchmarks.equal_runs --out benchmarks/results/cpu/equal_runs.json [--inputs .]

The run is the demo's (launch/recipes/demo.yaml: NF4 with double quantization, packed rows, fp32 compute on a CPU), with
its base and data made by the demo's scripts (or in `--inputs` by `make demo` before), in fewer and smaller steps. The
third run is ended by SIGKILL, which gives it no chance to save, and is started again by the same command: it repeats
the steps since its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import provenance

SAVE_EVERY = 20
KILLED_AFTER = 30  # steps, at least: it is killed when metrics.jsonl has that many
NAMES = ("1 rank", "2 ranks", "killed, started again")


def environment() -> dict[str, str]:
    """One thread for each process, so that sums have one order; this checkout's package, no network, no GPU."""
    more = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return os.environ | more | {"PYTHONPATH": str(provenance.ROOT)}


def make_inputs(folder: Path) -> None:
    """The demo's data and base, below `folder`."""
    for script in ("make_data", "make_base"):
        path = provenance.ROOT / "launch" / "demo" / f"{script}.py"
        subprocess.run([sys.executable, str(path)], cwd=folder, env=environment(), check=True)


def command(recipe: Path, run_dir: Path, ranks: int, steps: int, overrides: Sequence[str] = ()) -> list[str]:
    """The run; without a launcher on one rank, so that a signal to the process is one to the run."""
    settings = [f"run_dir={run_dir}", f"train.steps={steps}", "train.epochs=null", f"train.save_every={SAVE_EVERY}",
                "batch.rows_per_step=4", "batch.micro_rows=2", "data.row_tokens=128",
                "train.eval_every=null", "data.eval=[]", "logging.trackers=[]", *overrides]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    many = ["--ranks", str(ranks)] if ranks > 1 else []
    return [sys.executable, "-m", "qlora_dist", "train", str(recipe), *many, *words]


def losses(run_dir: Path) -> list[float]:
    """The loss of each step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "a step is missing or there twice"
    return [line["loss"] for line in lines]


def run(words: Sequence[str], folder: Path) -> None:
    """Raises CalledProcessError if it fails."""
    subprocess.run(words, cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)


def kill_after(words: Sequence[str], folder: Path, run_dir: Path, num_steps: int) -> list[float]:
    """Starts the run and ends it by SIGKILL once it has taken that many steps. Returns the losses until then."""
    file = run_dir / "metrics.jsonl"
    process = subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    while not file.exists() or file.read_text().count("\n") < num_steps:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before step {num_steps}")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line)["loss"] for line in lines]


def measure(recipe: Path, folder: Path, steps: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The three runs and by how much their losses differ."""
    found: dict[str, list[float]] = {}
    for name, ranks in zip(NAMES[:2], (1, 2), strict=True):
        run_dir = folder / f"runs/{ranks}"
        run(command(recipe, run_dir, ranks, steps, overrides), folder)
        found[name] = losses(run_dir)
    run_dir = folder / "runs/killed"
    words = command(recipe, run_dir, 1, steps, overrides)
    before = kill_after(words, folder, run_dir, KILLED_AFTER)
    run(words, folder)
    found[NAMES[2]] = losses(run_dir)
    assert all(len(values) == steps for values in found.values())
    resumed_from = len(before) // SAVE_EVERY * SAVE_EVERY
    return {
        "steps": steps,
        "save_every": SAVE_EVERY,
        "killed_after": len(before),
        "resumed_from": resumed_from,
        "repeated_steps_are_equal": before == found[NAMES[2]][: len(before)],
        "losses": found,
        "largest_difference": {
            name: max(abs(one - other) for one, other in zip(found[NAMES[0]], found[name], strict=True))
            for name in NAMES[1:]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, help="where the demo's scripts were run; else they are")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--allow-dirty", action="store_true")
    options = parser.parse_args()
    provenance.require_clean(options.allow_dirty)
    origin = provenance.collect(provenance.this_command("benchmarks.equal_runs"), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        if options.inputs is None:
            make_inputs(Path(name))
        else:
            Path(name, "build").symlink_to(options.inputs.resolve() / "build")
        recipe = provenance.ROOT / "launch" / "recipes" / "demo.yaml"
        record = {"benchmark": "equal_runs", "provenance": origin, **measure(recipe, Path(name), options.steps)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key not in ("provenance", "losses")}, indent=1))


if __name__ == "__main__":
    main()
