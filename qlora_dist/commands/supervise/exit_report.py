"""How one start of `train` ended, for who started it: a launcher in between turns every exit code but 0 into 1."""

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
    """What the file of `train --outcome FILE` says. No file: the run crashed."""

    kind: Literal["finished", "stopped", "user_error"]
    step: int = 0
    signal: str | None = None  # that asked for the stop
    text: str = ""


def report_outcome(path: Path | None, is_main: bool, run: Callable[[], TrainState]) -> None:
    """Runs `run` and writes how it ended. A user's mistake is reported by any rank: no other try will go better."""
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
        with contextlib.suppress(OSError):  # a full disk: then it counts as a crash, which stops after three tries
            write_json(path, asdict(outcome))
