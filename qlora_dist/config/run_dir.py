"""The run directory: the paths in it, and whether it belongs to a run of this config."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import RunFailed, UserError
from ..files import write_json, write_text

# Fields that may differ between two starts of a run: they affect memory, speed or reports, not the mathematics.
FREE_FIELDS = (
    "run_dir",
    "batch.micro_rows",
    "memory",
    "strategy",
    "logging",
    "model.attention",
    "model.kernels",
    "model.cache_4bit",
    "train.save_every",
    "train.eval_every",
    "train.keep",
    "train.longest_first",
    "data.num_workers",
    "data.cache_dir",
    "data.require_eos",
)


class RunDir:
    """Folder of a run and the paths in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / "lock"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.summary = path / "summary.json"
        self.completed = path / "completed"

    def newest_step(self) -> int:
        """Step of the newest checkpoint by folder name, -1 if there is none. Verifies nothing, uses no clock."""
        return max((checkpoint_step(path.parent) for path in self.checkpoints.glob("step-*/manifest.json")), default=-1)

    def completed_steps(self, length: dict[str, Any]) -> int | None:
        """Number of steps if the run was completed with this length (train.steps, train.epochs), else None."""
        try:
            written = json.loads(self.completed.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return int(written["step"]) if written["length"] == length else None

    def require_present(self) -> None:
        """Raises RunFailed when the folder was removed or replaced while a run was using it."""
        if not self.config.is_file():
            raise RunFailed(
                f"run_dir {self.path} was removed or replaced while this run was using it ({self.config.name} is "
                "gone), and with it what was saved there. Put it back, if you can, and start the same command again: "
                "it resumes from the newest checkpoint that is there, or begins anew"
            )

    def mark_completed(self, step: int, length: dict[str, Any]) -> None:
        """The last write of a run."""
        write_json(self.completed, {"step": step, "length": length})

    def open(self, config_text: str, free_fields: tuple[str, ...] = ()) -> None:
        """Creates the folder and writes the resolved config. Raises UserError if it holds another config's run.

        `free_fields` may differ in addition to FREE_FIELDS.
        """
        self.make()
        if self.config.exists():
            changed = config_changes(self.config.read_text(encoding="utf-8"), config_text, free_fields)
            if changed:
                raise UserError(
                    f"run_dir {self.path} holds a run with a different config:\n"
                    + "\n".join(changed)
                    + "\nchoose another run_dir, or restore these values to continue that run"
                )
        elif others := sorted(entry.name for entry in self.path.iterdir() if entry.name != self.lock.name)[:5]:
            raise UserError(
                f"run_dir {self.path} is not empty but holds no run (no config.yaml; found {', '.join(others)}); "
                "choose another folder"
            )
        write_text(self.config, config_text)

    def make(self) -> None:
        """Creates the folder. Raises UserError if it is not writable."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run_dir {self.path}: cannot be written ({error.strerror}); "
                "choose another folder or fix its permissions"
            ) from None


def checkpoint_step(path: Path) -> int:
    """The step that names a checkpoint's folder, -1 for any other name (those set aside do not count)."""
    found = re.fullmatch(r"step-([0-9]{8,18})", path.name)
    return int(found[1]) if found else -1


def config_changes(saved: str, current: str, free_fields: tuple[str, ...] = ()) -> list[str]:
    """One line per key in which two resolved configs (YAML) differ, except FREE_FIELDS and `free_fields`."""
    old, new = _flatten(yaml.safe_load(saved)), _flatten(yaml.safe_load(current))
    free = FREE_FIELDS + free_fields
    return [
        f"  {key}: was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == field or key.startswith(field + ".") for field in free)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
        return {name: leaf for key, inner in items for name, leaf in _flatten(inner, key).items()}
    return {prefix: value}


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line truncated by a crash is skipped."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
