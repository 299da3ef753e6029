"""The run directory: the paths in it, and whether it belongs to a run of this config."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import MachineFailed, RunFailed, UserError, explain_os_error, os_errors
from ..files import write_json, write_text
from .changes import BY_CONTENT, config_changes, is_dumped, moved_paths, resolved_leaves
from .json_file import read_json_object
from .sections import TrainConfig

log = logging.getLogger(__name__)


class RunDir:
    """Folder of a run and the paths in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / "lock"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"  # what rank 0 said, start after start
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.eval_at_start = path / "eval_start.json"
        self.adapter = path / "adapter"
        self.model = path / "model"  # of full fine-tuning
        self.reference = path / "reference.safetensors"  # logits of the trained model, to compare a merged one with
        self.summary = path / "summary.json"
        self.history = path / "history.jsonl"  # starts and ends
        self.samples = path / "samples.json"  # answers before and after, where something wrote them
        self.report = path / "report.html"
        self.completed = path / "completed"
        self._pending: str | None = None  # the config of this start until `begin`
        self._has_moved = False  # whether its paths still have to be compared with those of the run by content
        self._is_new = not os.path.lexists(path)

    def newest_step(self) -> int:
        """Step of the newest checkpoint by folder name, -1 if there is none. Verifies nothing, uses no clock."""
        return max((checkpoint_step(path.parent) for path in self.checkpoints.glob("step-*/manifest.json")), default=-1)

    def describe_completed(self, steps: int) -> str:
        """What a start of a run says that is finished."""
        return f"{self.path}: this run is finished ({steps} steps, see {self.summary}); nothing to do"

    def completed_steps(self, length: dict[str, Any]) -> int | None:
        """Number of steps if the run was completed with this length (train.steps, train.epochs), else None.

        None as well while the files of this start must still be compared with those of the run.
        """
        if self._has_moved:
            return None
        try:
            written = read_json_object(self.completed, str(self.completed))
            step, written_length = written["step"], written["length"]
        except (UserError, KeyError):
            return None  # damaged: the results are written once more
        return step if type(step) is int and written_length == length else None

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
        """Creates the folder for a start with this resolved config. Raises UserError if it holds another config's run.

        `free_fields` may differ in addition to FREE_FIELDS. The lock is held: what earlier starts left half-written is
        removed. A folder in which no start saved anything is new. The config itself is written by `begin`: a start that
        is refused leaves nothing. Where only the paths of BY_CONTENT differ, the checkpoints decide before that.
        """
        self.make()
        with os_errors(f"run_dir {self.path}: cannot be prepared", "Nothing that was saved there has changed"):
            self._remove_leftovers()
            self._compare(config_text, free_fields)
            self._pending = config_text

    def check(self, config_text: str, free_fields: tuple[str, ...] = ()) -> None:
        """What `open` would refuse, without writing anything. Raises UserError."""
        if self.path.is_dir():
            self._compare(config_text, free_fields)
            return
        above = self.path
        while not os.path.lexists(above):
            above = above.parent
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            why = "is not a folder" if not above.is_dir() else "is not writable"
            raise UserError(
                f"run_dir {self.path}: cannot be written ({above} {why}); choose another folder or fix its permissions"
            )

    def require_no_checkpoints(self) -> None:
        """Raises UserError for `--resume never` where there is something to resume."""
        if self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*")):
            raise UserError(
                f"--resume never, but {self.checkpoints} holds checkpoints; choose another run_dir, use --resume auto "
                "to continue, or --fresh to set that run aside"
            )

    def _compare(self, config_text: str, free_fields: tuple[str, ...]) -> None:
        self._require_kinds()
        saved, origin = self._saved_config()
        if saved is not None:
            by_content = BY_CONTENT if self.newest_step() >= 0 else ()
            changed = config_changes(saved, config_text, free_fields, origin, by_content)
            if changed and (self._holds_progress() or not is_dumped(saved)):
                raise UserError(
                    f"run_dir {self.path} holds a run with a different config:\n"
                    + "\n".join(changed)
                    + "\nrestore these values to continue that run, choose another run_dir, or start over with "
                    "--fresh, which renames that run and deletes nothing"
                )
            self._has_moved = not changed and bool(moved_paths(saved, config_text))

    def begin(self) -> None:
        """All checks have passed, the resume among them: from here on the run is here. Writes the config."""
        if self._pending is not None:
            with os_errors(f"run_dir {self.path}: {self.config.name} cannot be written", "Checkpoints are intact"):
                write_text(self.config, self._pending)
            self._pending, self._has_moved = None, False

    def discard(self) -> None:
        """The end of a start: the folder is removed if this start made it and nothing is in it."""
        if self._is_new:
            with suppress(OSError):
                self.path.rmdir()

    def set_aside(self) -> Path | None:
        """Moves a run that is here into a folder beside it, named with the date; None when there is none.

        The lock is held, and stays. Raises UserError when the folder is in use for something else.
        """
        if not self._holds_progress() or self._saved_config()[0] is None:
            return None
        first = f"{self.path}.{time.strftime('%Y-%m-%d-%H%M%S')}"
        names = (Path(first + number) for number in ("", *(f"-{n}" for n in range(2, 1000))))
        aside = next(path for path in names if not os.path.lexists(path))
        with os_errors(f"run_dir {self.path}: the run cannot be set aside as {aside}", "Nothing was deleted"):
            aside.mkdir()
            # the checkpoints last: whenever this ends early, what is left here is still that run
            entries = [entry for entry in self.path.iterdir() if entry != self.lock]
            for entry in sorted(entries, key=lambda entry: entry == self.checkpoints):
                entry.rename(aside / entry.name)
        return aside

    def make(self) -> None:
        """Creates the folder. Raises UserError if it is not writable, MachineFailed if the disk is full or fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            explained = explain_os_error(f"run_dir {self.path}: cannot be written", error)
            if isinstance(explained, MachineFailed):
                raise explained from None
            raise UserError(
                f"run_dir {self.path}: cannot be written ({error.strerror}); "
                "choose another folder or fix its permissions"
            ) from None

    def _remove_leftovers(self) -> None:
        """What a start that was killed left half-written: names that only this package makes."""
        names = [path.name for path in (self.lock, self.report, *self._files())]
        folders = [path.name for path in (self.adapter, self.model)]
        made = re.compile(
            r"\.(write-test-.*|seen-.*|({})\..*|({})\.incomplete.*)".format(
                *("|".join(map(re.escape, some)) for some in (names, folders))
            )
        )
        for entry in self.path.iterdir():
            if made.fullmatch(entry.name):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)

    def _files(self) -> tuple[Path, ...]:
        return self.config, self.metrics, self.log, self.eval_at_start, self.summary, self.completed

    def _require_kinds(self) -> None:
        """Raises UserError for a folder where the run will write a file, or the reverse: not after the last step."""
        odd = [(path, "a file") for path in self._files() if os.path.lexists(path) and not path.is_file()]
        for path in (self.checkpoints, self.tensorboard, self.adapter, self.model):
            is_result = path in (self.adapter, self.model)  # replaced as a whole: no link to somewhere else
            if os.path.lexists(path) and (not path.is_dir() or (is_result and path.is_symlink())):
                odd.append((path, "a folder"))
        if odd:
            path, expected = odd[0]
            raise UserError(
                f"{path} is {_kind(path)}, where this run writes {expected}; move it away, or choose another run_dir, "
                "and start the same command again"
            )

    def saved_fields(self) -> dict[str, Any] | None:
        """The config of the run that is here, by dotted names; None in a new folder, and where `open` finds fault."""
        try:
            text, _ = self._saved_config()
            return None if text is None else resolved_leaves(text)
        except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def eval_rows(self, train: TrainConfig) -> int | Literal["all"]:
        """train.eval_rows of a start with this section: its own, or, where it leaves the key out, that of the run."""
        if "eval_rows" not in train.model_fields_set and self._holds_progress():
            saved = (self.saved_fields() or {}).get("train.eval_rows")
            if saved == "all" or (type(saved) is int and saved > 0):
                return saved
        return train.eval_rows

    def _holds_progress(self) -> bool:
        has_metrics = self.metrics.exists() and self.metrics.stat().st_size > 0
        has_results = any(path.exists() for path in (self.adapter, self.model, self.summary, self.completed))
        return has_metrics or has_results or any(self.checkpoints.glob("*step-*"))

    def _saved_config(self) -> tuple[str | None, str]:
        """(the config of the run that is here, or None in a new folder; where it was found).

        Raises UserError when the folder is in use for something else, or the config cannot be read.
        """
        if self.config.is_file():
            return self.config.read_bytes().decode("utf-8", errors="replace"), str(self.config)
        for path in sorted(self.checkpoints.glob("step-*/state.json"), reverse=True):
            try:
                text = read_json_object(path, str(path))["config"]
            except (UserError, KeyError):
                continue
            if isinstance(text, str):
                return text, str(path)
        own = {self.lock}
        if not self._holds_progress():  # what a start makes before it saves anything
            own |= {self.checkpoints, self.tensorboard, self.metrics, self.log, self.eval_at_start}
            own |= {self.history, self.report}
        # hidden names are those of file systems and desktops
        others = sorted(e.name for e in self.path.iterdir() if e not in own and not e.name.startswith("."))[:5]
        if others:
            raise UserError(
                f"run_dir {self.path} is not empty but holds no run (no config.yaml; found {', '.join(others)}); "
                "choose another folder"
            )
        return None, ""


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a symbolic link"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"


def checkpoint_step(path: Path) -> int:
    """The step that names a checkpoint's folder, -1 for any other name (those set aside do not count)."""
    found = re.fullmatch(r"step-([0-9]{8,18})", path.name)
    return int(found[1]) if found else -1


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line truncated by a crash is skipped, and so are damaged ones."""
    return (values for line in _lines(path) if (values := _step_values(line)) is not None)


def num_damaged_metrics(path: Path) -> int:
    """Number of whole lines of a metrics.jsonl that `read_metrics` skips."""
    return sum(line.endswith("\n") and _step_values(line) is None for line in _lines(path))


def _lines(path: Path) -> Iterator[str]:
    if path.exists():
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            yield from file


def _step_values(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None
