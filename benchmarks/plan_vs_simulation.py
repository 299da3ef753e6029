"""The plan's arithmetic against the real code under fake tensors, for commonly trained shapes.

    python -m benchmarks.plan_vs_simulation --out benchmarks/results/cpu/plan_vs_simulation.json

Each cell is one training step: model x row length x recompute level (none, half of the layers, all), QLoRA as in the
paper (NF4, double quantization, r = 64 on all linear layers, paged AdamW), one row at a time, every token a label.
`error` is (plan - simulation) / simulation of all tensors alive at the peak. The 63 cells take about half an hour on
one CPU core; the file is written after each, and cells that it already has for the same commit are not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qlora_dist.cluster import provenance
from qlora_dist.commands.plan.simulate import simulate
from qlora_dist.config import RunConfig, parse_config
from qlora_dist.memory import plan_memory, shapes_from_config

_LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-7B": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "Llama-13B": {
        **_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    },
    "Llama-65B": {
        **_LLAMA, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "Llama-3-8B": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "Llama-3-70B": {
        **_LLAMA, "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "Mistral-7B": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    },
}  # fmt: skip
ROWS = (512, 2048, 4096)


def run_config(row_tokens: int) -> RunConfig:
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"name": "unused"},
            "data": {"train": [{"path": "unused"}], "row_tokens": row_tokens},
            "train": {"steps": 1},
        }
    )


def cell(name: str, row_tokens: int, level: str) -> dict[str, Any]:
    """One step, planned and simulated."""
    raw = MODELS[name]
    shapes = shapes_from_config(raw)
    assert shapes is not None
    recompute = {"none": 0, "half": shapes.num_layers // 2, "full": shapes.num_layers}[level]
    config = run_config(row_tokens)
    plan = plan_memory(config, shapes, world_size=1, device_bytes=None, recompute=recompute, micro_rows=1)
    pretrained = AutoConfig.for_model(raw["model_type"], **{k: v for k, v in raw.items() if k != "model_type"})
    started = time.perf_counter()
    trace = simulate(config, plan, pretrained)
    return {
        "model": name,
        "row_tokens": row_tokens,
        "recompute": level,
        "base_parameters": plan.base_parameters,
        "trainable_parameters": plan.trainable_parameters,
        "planned_bytes": trace.planned_bytes,
        "simulated_bytes": trace.peak_bytes,
        "error": trace.error,
        "planned_peak_at": plan.peak_at,
        "simulated_peak_at": trace.peak_at,
        "items": {key: item.size for key, item in plan.items.items()},
        "simulated_categories": trace.categories,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    arguments = parser.parse_args()
    commit = provenance.commit()
    done: list[dict[str, Any]] = []
    if arguments.out.exists() and (kept := json.loads(arguments.out.read_text()))["commit"] == commit:
        done = kept["cells"]
    keys = {(one["model"], one["row_tokens"], one["recompute"]) for one in done}
    for name in arguments.models:
        for row_tokens in arguments.rows:
            for level in ("none", "half", "full"):
                if (name, row_tokens, level) in keys:
                    continue
                done.append(cell(name, row_tokens, level))
                print(
                    {key: done[-1][key] for key in ("model", "row_tokens", "recompute", "error", "seconds")}, flush=True
                )
                write(arguments.out, commit, done)
    write(arguments.out, commit, done)


def write(path: Path, commit: str | None, cells: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    errors = sorted(abs(one["error"]) for one in cells)
    result = {
        "command": "python -m benchmarks.plan_vs_simulation --out benchmarks/results/cpu/plan_vs_simulation.json",
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": provenance.versions(),
        "largest_error": errors[-1] if errors else None,
        "median_error": errors[len(errors) // 2] if errors else None,
        "cells": cells,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
