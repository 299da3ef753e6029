"""The run directory: the paths in it, and whether it belongs to a run of this config."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import MachineFailed, RunFailed, UserError, explain_os_error, os_errors, shortened
from ..files import write_json, write_text
from .json_file import read_json_object
from .reading import BoundedLoader
from .sections import RunConfig

log = logging.getLogger(__name__)

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

# Fields that name files whose content a checkpoint records: after a move of the files their paths differ alone
BY_CONTENT = ("model.name", "lora.init_from", "data.train", "data.eval", "data.template")


class RunDir:
    """Folder of a run and the paths in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / "lock"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.eval_at_start = path / "eval_start.json"
        self.adapter = path / "adapter"
        self.model = path / "model"  # of full fine-tuning
        self.summary = path / "summary.json"
        self.completed = path / "completed"
        self._unconfirmed: str | None = None  # the config of this start, see `open`

    def newest_step(self) -> int:
        """Step of the newest checkpoint by folder name, -1 if there is none. Verifies nothing, uses no clock."""
        return max((checkpoint_step(path.parent) for path in self.checkpoints.glob("step-*/manifest.json")), default=-1)

    def completed_steps(self, length: dict[str, Any]) -> int | None:
        """Number of steps if the run was completed with this length (train.steps, train.epochs), else None.

        None as well while the files of this start must still be compared with those of the run.
        """
        if self._unconfirmed is not None:
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
        """Creates the folder and writes the resolved config. Raises UserError if it holds another config's run.

        `free_fields` may differ in addition to FREE_FIELDS. The lock is held: what earlier starts left half-written is
        removed, and a config that was written by a start that saved nothing is replaced. Where only the paths of
        BY_CONTENT differ, the checkpoints decide: the config is written by `confirm`, once their files are the same.
        """
        self.make()
        with os_errors(f"run_dir {self.path}: cannot be prepared", "Nothing that was saved there has changed"):
            self._remove_leftovers()
            self._require_kinds()
            saved, origin = self._saved_config()
            if saved is not None:
                by_content = BY_CONTENT if self.newest_step() >= 0 else ()
                changed = config_changes(saved, config_text, free_fields, origin, by_content)
                if changed and (self._holds_progress() or not _is_dumped(saved)):
                    raise UserError(
                        f"run_dir {self.path} holds a run with a different config:\n"
                        + "\n".join(changed)
                        + "\nchoose another run_dir, or restore these values to continue that run"
                    )
                if changed:
                    log.warning(
                        "run_dir %s: an earlier start saved nothing; its config is replaced (%d changes, first:%s)",
                        self.path, len(changed), changed[0],
                    )  # fmt: skip
                elif moved_paths(saved, config_text):
                    self._unconfirmed, config_text = config_text, saved
            write_text(self.config, config_text)

    def confirm(self) -> None:
        """The files that this start's config names are those of the run: the config is written with their paths."""
        if self._unconfirmed is not None:
            with os_errors(f"run_dir {self.path}: {self.config.name} cannot be written", "Checkpoints are intact"):
                write_text(self.config, self._unconfirmed)
            self._unconfirmed = None

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
        names = [path.name for path in (self.lock, *self._files())]
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
        return self.config, self.metrics, self.eval_at_start, self.summary, self.completed

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
            return None if text is None else _resolved(text)
        except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

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
            own |= {self.checkpoints, self.tensorboard, self.metrics, self.eval_at_start}
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


def config_changes(
    saved: str,
    current: str,
    free_fields: tuple[str, ...] = (),
    origin: str = "the saved config",
    by_content: tuple[str, ...] = (),
) -> list[str]:
    """One line per key in which two resolved configs (YAML) differ, except FREE_FIELDS and `free_fields`.

    They are compared as models: a field that one of them lacks has its default there. Two paths of one file are equal,
    and in fields of `by_content` any two local paths. Raises UserError, naming `origin`, when the saved one cannot be
    read.
    """
    old, new = _compared(saved, current, origin)
    free = FREE_FIELDS + free_fields
    return [
        f"  {key}: was {shortened(old.get(key))}, now {shortened(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == field or key.startswith(field + ".") for field in free)
        and not (key in by_content and _without_paths(old.get(key)) == _without_paths(new.get(key)))
    ]


def moved_paths(saved: str, current: str) -> list[str]:
    """The fields of BY_CONTENT in which two resolved configs differ by local paths alone."""
    old, new = _compared(saved, current, "the saved config")
    return [
        key
        for key in BY_CONTENT
        if old.get(key) != new.get(key) and _without_paths(old.get(key)) == _without_paths(new.get(key))
    ]


def _compared(saved: str, current: str, origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        old = _resolved(saved)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{origin} is damaged: it is not the config of a run ({shortened(str(error))}). Restore it; if it is a "
            "config.yaml beside checkpoints it may be deleted instead: they hold the config, too"
        ) from None
    new = _resolved(current)
    for key in BY_CONTENT:
        if _mapped(old.get(key), os.path.realpath) == _mapped(new.get(key), os.path.realpath):
            old.pop(key, None), new.pop(key, None)
    return old, new


def _without_paths(value: Any) -> Any:
    if isinstance(value, list):  # which records a source's name draws is in the fingerprint of the documents
        value = [{**one, "name": ""} if isinstance(one, dict) else one for one in value]
    return _mapped(value, lambda _: "/")


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    """The value of a BY_CONTENT field (a name or path, or a list of sources), a function applied to its local paths."""
    if isinstance(value, list):
        return [{**one, "path": _mapped(one.get("path"), function)} if isinstance(one, dict) else one for one in value]
    return function(value) if isinstance(value, str) and value.startswith("/") else value


def _resolved(text: str) -> dict[str, Any]:
    """The leaves of a config with today's defaults for the fields that it lacks. A value that today's fields do not
    take (another version wrote it) stands for itself."""
    raw = yaml.load(text, Loader=BoundedLoader)
    if not isinstance(raw, dict):
        raise ValueError(f"expected a mapping of sections, found {type(raw).__name__}")
    foreign: dict[str, Any] = {}
    copy = json.loads(json.dumps(raw))
    while True:
        try:
            return _flatten(json.loads(RunConfig.model_validate(copy).model_dump_json())) | foreign
        except ValidationError as error:
            # all are found before one is removed: two may be about the same value
            found = dict(filter(None, (_find(copy, item["loc"]) for item in error.errors())))
        if not found:  # sections are missing
            return _flatten(raw)
        foreign |= {key: section.pop(name) for key, (section, name) in found.items()}


def _find(config: dict[str, Any], location: tuple[int | str, ...]) -> tuple[str, tuple[dict[str, Any], str]] | None:
    """The key of the innermost named value at a location of plain data, and its section; None when nothing is there."""
    node: Any = config
    found, key = None, ""
    for depth, part in enumerate(location):  # the end of a location may name one of several types
        if isinstance(node, dict) and part in node:
            found, key = (node, str(part)), ".".join(map(str, location[: depth + 1]))
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            break
    return None if found is None else (key, found)


def _is_dumped(text: str) -> bool:
    """Whether a config was written by this package and not by hand."""
    return yaml.safe_dump(yaml.load(text, Loader=BoundedLoader), sort_keys=False, allow_unicode=True) == text


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
        return {name: leaf for key, inner in items for name, leaf in _flatten(inner, key).items()}
    return {prefix: value}


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
