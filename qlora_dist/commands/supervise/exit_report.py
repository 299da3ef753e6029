"""How one start of `train` ended, for `supervise`: a launcher in between turns every exit code except 0 into 1."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...errors import UserError
from ...files import write_json

if TYPE_CHECKING:
    from ...train import TrainState  # imports torch, which `supervise` does without


@dataclass(frozen=True)
class Outcome:
    """Content of the file of `train --outcome FILE`. No file: the run crashed."""

    kind: Literal["finished", "stopped", "user_error"]
    step: int = 0
    signal: str | None = None  # that requested the stop
    text: str = ""


def report_outcome(path: Path | None, is_main: bool, run: Callable[[], TrainState]) -> None:
    """Runs `run` and records how it ended. Any rank records a user's mistake: another attempt would fail, too."""
    try:
        state = run()
    except UserError as error:
        _write(path, Outcome("user_error", text=str(error)))
        raise
    if is_main:
        kind: Literal["finished", "stopped"] = "finished" if state.stopped_by is None else "stopped"
        _write(path, Outcome(kind, state.step, state.stopped_by))


def read_outcome(path: Path) -> Outcome | None:
    """The outcome, or None after a crash."""
    try:
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path | None, outcome: Outcome) -> None:
    if path is not None:
        with contextlib.suppress(OSError):  # a full disk: then it counts as a crash
            write_json(path, asdict(outcome))
