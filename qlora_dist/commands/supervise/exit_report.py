"""How one start of `train` ended, for `supervise`: a launcher in between turns every exit code except 0 into 1."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...config.json_file import read_json_object
from ...errors import MachineFailed, UserError, explain_os_error
from ...files import write_json

if TYPE_CHECKING:
    from ...train import TrainState  # imports torch, which `supervise` does without


# Failures, weakest knowledge first: of several ranks' reports the strongest stays. A mistake of the user's fails again;
# a lost connection is only how the other ranks saw the failure of one.
FAILURES = ("failed", "machine_failed", "user_error")
GOOD_ENDS = ("stopped", "finished")  # said by rank 0 alone


@dataclass(frozen=True)
class Outcome:
    """Content of the file of `train --outcome FILE`. No file: the run was killed."""

    kind: Literal["failed", "machine_failed", "user_error", "stopped", "finished"]
    step: int = 0
    signal: str | None = None  # that requested the stop
    text: str = ""


def report_outcome(path: Path | None, is_main: bool, run: Callable[[], TrainState]) -> None:
    """Runs `run` and records how it ended: rank 0 a good end, any rank a failure."""
    try:
        state = run()
    except BaseException as error:
        _write(path, _failure(error))
        raise
    if is_main:
        kind: Literal["finished", "stopped"] = "finished" if state.stopped_by is None else "stopped"
        _write(path, Outcome(kind, state.step, state.stopped_by))


def _failure(error: BaseException) -> Outcome:
    text = str(error) or repr(error)
    if isinstance(error, OSError):  # as the command line explains it
        error = explain_os_error("the run met an error of the system", error)
    if isinstance(error, UserError):
        return Outcome("user_error", text=text)
    is_machine = isinstance(error, MachineFailed | MemoryError)
    return Outcome("machine_failed" if is_machine else "failed", text=text)


def read_outcome(path: Path) -> Outcome | None:
    """The outcome, or None when the run was killed before it could say anything, or the file is damaged."""
    try:
        outcome = Outcome(**read_json_object(path, str(path)))
    except (UserError, TypeError):  # TypeError: other fields
        return None
    is_known = outcome.kind in FAILURES + GOOD_ENDS
    is_sound = is_known and isinstance(outcome.text, str) and isinstance(outcome.signal, str | None)
    return outcome if is_sound else None


def _write(path: Path | None, outcome: Outcome) -> None:
    if path is None:
        return
    order, before = FAILURES + GOOD_ENDS, read_outcome(path)
    if outcome.kind in GOOD_ENDS or before is None or order.index(outcome.kind) > order.index(before.kind):
        with contextlib.suppress(OSError):  # a full disk: then it counts as a crash
            write_json(path, asdict(outcome))
