"""A run directory without a run: what the page of one is drawn from."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from qlora_dist.config import dump_yaml, parse_config
from qlora_dist.files import GIB
from qlora_dist.pages import append_event

HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"


def step_line(step: int, num_steps: int, rng: random.Random) -> dict[str, Any]:
    """A line of metrics.jsonl; every tenth of the run has held-out values."""
    loss = 1.2 + 1.5 * math.exp(-6 * step / num_steps) + rng.gauss(0, 0.08)
    line = {
        "step": step, "epoch": 0, "loss": loss, "lr": 2e-4 * (1 - step / num_steps), "grad_norm": rng.uniform(0.2, 0.6),
        "num_labels": 900, "tokens": 4000, "step_seconds": 2.0, "data_seconds": 0.25, "tokens_per_second": 1800.0,
        "peak_bytes": 39 * GIB + step, "imbalance": 1.02,
    }  # fmt: skip
    return line | ({"eval_loss": loss + 0.1, "eval_perplexity": 4.0} if step % max(1, num_steps // 10) == 0 else {})


def make_run(folder: Path, num_steps: int = 40, *, rank: int = 16, device: str = "cuda", text: str = HOSTILE) -> Path:
    """Writes a run of two starts, the first of which failed; `text` stands wherever text from outside does."""
    folder.mkdir(parents=True)
    config = parse_config(
        {
            "run_dir": str(folder),
            "model": {"name": f"base {text}"},
            "lora": {"rank": rank},
            "data": {"train": [{"path": "data.jsonl"}]},
            "train": {"steps": num_steps},
        }
    )
    (folder / "config.yaml").write_text(dump_yaml(config))
    rng = random.Random(rank)
    lines = [step_line(step, num_steps, rng) for step in range(1, num_steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "eval_start.json").write_text(json.dumps({"eval_loss": 2.9}))
    sample = {"prompt": f"Name {text} rivers", "before": "x" * 400, "after": "Ebro,\n\nTajo"}
    (folder / "samples.json").write_text(json.dumps([sample]))
    plan = {
        "items": {"base: codes": 32 * GIB, "activations": 5 * GIB}, "notes": {"base: codes": text},
        "peak_bytes": 40 * GIB, "tensor_bytes": 38 * GIB, "peak_at": "the backward pass of a layer",
    }  # fmt: skip
    start = {
        "num_steps": num_steps, "world_size": 2, "device": "NVIDIA A100-SXM4-80GB", "device_type": device,
        "host": "node-017.cluster.example.org", "plan": plan, "said": f"51,760 documents {text}\n" + "word " * 60,
    }  # fmt: skip
    history = folder / "history.jsonl"
    append_event(history, "start", step=0, **start)
    append_event(history, "end", step=num_steps // 2, kind="failed", text=f"rank 1: {text}")
    append_event(history, "start", step=num_steps // 2, **start)
    (folder / "checkpoints" / "rejected-step-00000007").mkdir(parents=True)
    (folder / "checkpoints" / f"step-{num_steps // 2:08d}").mkdir()
    return folder
