"""A whole run in seconds: tiny random Llama, word data, a config that tests modify."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

from helpers.tiny_models import save_model
from qlora_dist.config import RunConfig, parse_config


def make_inputs(folder: Path, num_examples: int = 60) -> dict[str, Any]:
    """Writes model and data below `folder`; returns a config as plain data."""
    model = save_model(folder / "model")
    rng = random.Random(0)
    words = [f"w{i}" for i in range(6, 100)]

    def record() -> dict[str, str]:
        return {
            "input": " ".join(rng.choices(words, k=rng.randint(2, 9))),
            "output": " ".join(["w6", "w7", "w8", "w9", "w10", "w11"][: rng.randint(1, 6)]),  # easy to learn
        }

    for name, count in (("train.json", num_examples), ("held_out.json", 12)):
        (folder / name).write_text(json.dumps([record() for _ in range(count)]))
    return {
        "run_dir": str(folder / "run"),
        "seed": 3,
        "model": {"name": str(model), "compute_dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {
            "train": [{"path": str(folder / "train.json"), "format": "input-output"}],
            "row_tokens": 32,
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"rows_per_step": 4},
        "optim": {"name": "adamw", "lr": 1e-2, "max_grad_norm": 1.0},
        "train": {"steps": 5},
        "logging": {"trackers": []},
    }


def changed(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a plain config; `optim__lr=1` changes raw["optim"]["lr"]."""
    copy: dict[str, Any] = json.loads(json.dumps(raw))
    for key, value in changes.items():
        node = copy
        *sections, last = key.split("__")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return copy


def config_of(raw: dict[str, Any], **changes: Any) -> RunConfig:
    return parse_config(changed(raw, **changes))


def train_here(raw: dict[str, Any]) -> None:
    """A whole run in this process, which may be a rank of `on_ranks`."""
    from qlora_dist.train import train

    train(parse_config(raw))


def resumed_digests(raw: dict[str, Any], run_dir: Path) -> tuple[list[str], list[str]]:
    """Digests of the last checkpoint of the finished run `raw`, and of its copy in `run_dir` that goes on from the
    checkpoint before."""
    shutil.copytree(raw["run_dir"], run_dir)
    last = max((run_dir / "checkpoints").iterdir())
    expected = digests_of(last)
    shutil.rmtree(last)
    (run_dir / "completed").unlink()
    train_here(changed(raw, run_dir=str(run_dir)))
    return expected, digests_of(last)


def write_config(path: Path, raw: dict[str, Any], **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(changed(raw, **changes)))
    return path


def metrics_of(run_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_dir: str | Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run_dir)]


def digests_of(
    folder: Path, names: tuple[str, ...] = ("adapter_model.safetensors", "optimizer.safetensors")
) -> list[str]:
    """SHA-256 of files of a checkpoint."""
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
