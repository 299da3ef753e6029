"""Host seconds of a training step, Python and dispatch, beside TRL's SFTTrainer and transformers' Trainer with PEFT.

    .venv/bin/python -m benchmarks.null.host --out benchmarks/results/null

On the null device a kernel takes no time, so a step's seconds are the host's alone: a GPU that is faster than them
waits for the host. The engines of a group hold the same shape with the same settings, are loaded together and step in
turns, forward and backward, so that a slow moment of the machine affects all of them equally. Weights are sparse files
of zeros. TRL must be importable by the interpreter of the null device (PYTHONPATH may name its folder).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import UserError

from .. import inputs, provenance, throughput
from ..cells import Cell, Group, Preset
from ..dataset import write_tokenizer
from ..shapes import config_json, shape_of
from ..sparse import WEIGHTS, write_sparse_weights
from . import counters
from .steps import environment, interpreter

WARMUP_STEPS, TURNS, STEPS_PER_TURN = 3, 8, 3
TIMEOUT_SECONDS = 900
PEERS = (("trl", "best"), ("trainer", "best"))


def groups(shapes: list[str]) -> tuple[Group, ...]:
    """One group per shape and recompute level: full rows of 2,048 tokens, NF4, r = 16, one row per step."""
    found = []
    for shape, _, depth in (name.partition(":") for name in shapes):
        layers = int(depth) if depth else None
        for recompute in ("none", "full"):
            ours = Cell("ours", "nf4-dq", shape, 2048, layers=layers, recompute=recompute, data="full")
            peers = [replace(ours, engine=engine, variant=variant) for engine, variant in PEERS]
            found.append(
                Group((ours, *peers), title=f"{shape}{f', {layers} layers' * bool(layers)}, recompute {recompute}")
            )
    return tuple(found)


def prepare(cell: Cell, scratch: Path) -> None:
    """The model's folder, with sparse weights, before `inputs.prepare` would draw them."""
    folder = inputs.model_folder(cell, scratch)
    if (folder / "tokenizer.json").exists():
        return
    folder.mkdir(parents=True)
    shape = shape_of(cell.shape, cell.layers)
    (folder / "config.json").write_text(json.dumps(config_json(shape)))
    write_sparse_weights(folder, folder / "storage")
    write_tokenizer(folder, shape.vocabulary)


def summarize(group: Group, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per step and engine: medians over turns; and the ratio to this package's, turn by turn."""
    ours = next(result for result in results if result["cell"]["engine"] == "ours")
    found = []
    for result in results:
        one: dict[str, Any] = {name: result[name] for name in ("cell", "name", "status", "reason")}
        one["group"] = group.title
        turns = result.get("turns", [])
        if result["status"] == "ok":
            per_step = [{name: turn[name] / turn["steps"] for name in turn if name != "steps"} for turn in turns]
            one |= {name: statistics.median(turn[name] for turn in per_step) for name in per_step[0]}
            if ours["status"] == "ok":
                for name in ("seconds", "cpu_seconds"):
                    ratios = [mine[name] / own[name] for mine, own in zip(turns, ours["turns"], strict=True)]
                    one[f"{name}_over_ours"] = statistics.median(ratios)
        found.append(one | {"turns": turns})
    return found


def measure(chosen: tuple[Group, ...], scratch: Path, command: str) -> dict[str, Any]:
    """All groups, as one raw result."""
    preset = Preset(chosen, WARMUP_STEPS, TURNS * STEPS_PER_TURN, TURNS, 0, TIMEOUT_SECONDS)
    origin = provenance.collect(command, torch.device("cuda", 0))
    run = throughput.Run(preset, scratch / "cells-out", scratch, origin, resume=False, joined=False)
    found = []
    try:
        for group in chosen:
            prepare(group.cells[0], scratch)
            found += summarize(group, run.group(group))
    finally:
        for worker in run.workers:
            worker.kill()
    return {"benchmark": "null_host", "provenance": origin, "weights": WEIGHTS, "cells": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=provenance.ROOT / "benchmarks" / "results" / "null")
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b:8"], help="Of benchmarks.shapes; 8b:8 is 8 layers.")
    parser.add_argument("--only", default="", help="Groups whose title contains this.")
    parser.add_argument("--scratch", type=Path, help="Folder for the inputs, kept (default: a temporary one).")
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    try:
        provenance.require_clean(arguments.allow_dirty)
        if not counters.IS_NULL:  # once more, where there is a device
            words = [interpreter(), "-m", "benchmarks.null.host", *sys.argv[1:]]
            os.execve(words[0], words, environment())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    chosen = tuple(one for one in groups(arguments.shapes) if arguments.only in one.title)
    command = provenance.this_command("benchmarks.null.host")
    with tempfile.TemporaryDirectory(prefix="null-host-") as folder:
        result = measure(chosen, arguments.scratch or Path(folder), command)
    out = arguments.out / "host.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for one in result["cells"]:
        figures = (f"{one[name]:.4g} {name}" for name in ("cpu_seconds", "seconds", "launches") if name in one)
        print(f"{one['name']}: {one['status']} {', '.join(figures)}{one['reason'][-300:]}")


if __name__ == "__main__":
    main()
