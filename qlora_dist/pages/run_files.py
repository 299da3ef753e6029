"""What a run directory says of its run, read for a page: nothing in it is trusted to be there, whole, or of a form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.json_file import read_json, read_json_object, regular_bytes
from ..config.run_dir import RunDir, checkpoint_step, num_damaged_metrics, read_metrics
from ..errors import UserError
from .curves import Curves
from .history import read_history

MAX_CONFIG = 2**18  # bytes, as of a config that is read
MAX_SAMPLES, MAX_SAMPLE_TEXT = 50, 4_000
SAMPLE_FIELDS = ("prompt", "before", "after", "expected")


@dataclass
class RunFiles:
    """One run, as its page shows it."""

    name: str
    path: Path
    curves: Curves
    config: str = ""  # YAML
    summary: dict[str, Any] = field(default_factory=dict)  # empty until the run is finished
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)  # steps
    set_aside: list[str] = field(default_factory=list)  # names of checkpoints that no start takes
    num_damaged: int = 0  # lines of metrics.jsonl that cannot be read
    is_finished: bool = False

    def leaves(self) -> dict[str, Any]:
        """The config by dotted names, with defaults; empty when it cannot be read."""
        return RunDir(self.path).saved_fields() or {}


def read_curves(run: RunDir) -> Curves:
    """All points of a run. Raises OSError."""
    curves = Curves()
    curves.add_held_out(0, _object(run.eval_at_start))
    for line in read_metrics(run.metrics):
        curves.add(line)
    return curves


def read_run(path: Path, curves: Curves | None = None) -> RunFiles:
    """What is in a run directory; `curves`: where they are known already. Raises OSError."""
    run = RunDir(path)
    folders = [entry.name for entry in run.checkpoints.iterdir()] if run.checkpoints.is_dir() else []
    return RunFiles(
        name=path.resolve().name,
        path=path,
        curves=read_curves(run) if curves is None else curves,
        config=_text(run.config),
        summary=_object(run.summary),
        history=read_history(run.history),
        samples=_samples(run.samples),
        checkpoints=sorted(step for name in folders if (step := checkpoint_step(Path(name))) >= 0),
        set_aside=sorted(name for name in folders if name.startswith(("rejected-", "abandoned-"))),
        num_damaged=num_damaged_metrics(run.metrics) if curves is None else 0,
        is_finished=run.completed.is_file(),
    )


def holds_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    run = RunDir(path)
    return run.config.is_file() or run.metrics.is_file()


def _text(path: Path) -> str:
    try:
        return regular_bytes(path, MAX_CONFIG).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, str(path))
    except UserError:
        return {}


def _samples(path: Path) -> list[dict[str, str]]:
    try:
        content = read_json(path, str(path))
    except UserError:
        return []
    rows = [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []
    found = [{key: str(row[key])[:MAX_SAMPLE_TEXT] for key in SAMPLE_FIELDS if key in row} for row in rows]
    return [row for row in found if "prompt" in row][:MAX_SAMPLES]
