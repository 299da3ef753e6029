"""The run directory: the names of what lies in it, and whether it holds a run of this config."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..files import write_json, write_text

# Fields that may differ between two starts of one run: they change memory, speed or reports, not the mathematics.
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


@dataclass(frozen=True)
class RunDir:
    """Folder of a run; the names of what lies in it."""

    path: Path

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def completed(self) -> Path:
        return self.path / "completed"

    def newest_step(self) -> int:
        """Step of the newest checkpoint by its name, -1 without one. Nothing is verified, and no clock is asked."""
        names = [path.parent.name for path in self.checkpoints.glob("step-*/manifest.json")]
        return max((int(name.removeprefix("step-")) for name in names if name[5:].isdigit()), default=-1)

    def completed_steps(self, length: dict[str, Any]) -> int | None:
        """Steps of the finished run if it was finished at this length (train.steps, train.epochs), else None."""
        try:
            written = json.loads(self.completed.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return int(written["step"]) if written["length"] == length else None

    def mark_completed(self, step: int, length: dict[str, Any]) -> None:
        """The last thing that a run writes."""
        write_json(self.completed, {"step": step, "length": length})

    def open(self, config_text: str, free_fields: tuple[str, ...] = ()) -> None:
        """Makes the folder and writes the resolved config. Raises UserError when it holds a run of another config.

        `free_fields` may differ besides FREE_FIELDS.
        """
        self.make()
        if self.config.exists():
            changed = config_changes(self.config.read_text(encoding="utf-8"), config_text, free_fields)
            if changed:
                raise UserError(
                    f"run_dir {self.path} holds a run of another config:\n"
                    + "\n".join(changed)
                    + "\nchoose another run_dir, or set these back to continue that run"
                )
        elif others := sorted(entry.name for entry in self.path.iterdir() if entry.name != self.lock.name)[:5]:
            raise UserError(
                f"run_dir {self.path} is not empty and holds no run (no config.yaml; found {', '.join(others)}); "
                "choose another folder"
            )
        write_text(self.config, config_text)

    def make(self) -> None:
        """Makes the folder. Raises UserError when it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run_dir {self.path}: cannot be written ({error.strerror}); choose another folder or mend its rights"
            ) from None


def config_changes(there: str, now: str, free_fields: tuple[str, ...] = ()) -> list[str]:
    """Lines that name each key in which two resolved configs (YAML) differ, but for FREE_FIELDS and `free_fields`."""
    old, new = _flatten(yaml.safe_load(there)), _flatten(yaml.safe_load(now))
    free = FREE_FIELDS + free_fields
    return [
        f"  {key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == field or key.startswith(field + ".") for field in free)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
        return {name: leaf for key, inner in items for name, leaf in _flatten(inner, key).items()}
    return {prefix: value}


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
