"""A whole config of another trainer -> a config of this package.

Every key of it, and every default of that trainer that differs from the one here, becomes a line: translated, or in
need of nothing here, or not translated. Keys that nobody knows are among the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..commented import Setting, commented_yaml, nested
from ..reading import apply_override, parse_config, parse_yaml, read_yaml
from ..sections import RunConfig
from .answers import EACH, Answer, Given, lost, named, shown
from .table import lookup
from .trainers import DEFAULTS, NAMES, REPLACED, detect

# keys that decide what is trained: a config without them would train something else
_DECISIVE = ("stage", "rl", "finetuning_type", "adapter")
_SECRET = re.compile("api_key|secret|password|auth_token|hub_token", re.IGNORECASE)
_WHOLE = ("deepspeed",)  # sections that are answered as one


@dataclass(frozen=True)
class Line:
    """A key of theirs, and what became of it."""

    key: str
    value: Any
    answer: Answer
    is_default: bool = False  # of their trainer: the key itself is absent

    @property
    def origin(self) -> str:
        """As it stands there; secrets are not repeated."""
        return f"{self.key}: {'(not shown)' if _SECRET.search(self.key) and self.value else shown(self.value)}"


@dataclass(frozen=True)
class Translation:
    """A config of this package, as text, and what became of each key."""

    trainer: str
    gpus: int
    lines: tuple[Line, ...]
    settings: tuple[Setting, ...]

    @property
    def lost(self) -> list[Line]:
        """The keys that were not translated."""
        return [line for line in self.lines if line.answer.is_lost]

    def text(self, file: str) -> str:
        """The config as YAML. Each line says what it came from, the end what was not translated."""
        header = [f"Translated from {file}, a config of {NAMES[self.trainer]}, for {_gpus(self.gpus)}."]
        footer = [f"Not translated from {file}:"] * bool(self.lost)
        footer += [f"  {line.origin}: {line.answer.text}" for line in self.lost]
        return commented_yaml(self.settings, header, footer)


def translate_file(
    path: str | Path, *, trainer: str | None = None, gpus: int = 1, overrides: Sequence[str] = ()
) -> Translation:
    """Reads a YAML or JSON config of another trainer. `trainer`: whose, if the keys do not tell; `overrides`: `a.b=c`,
    of this package's keys.

    Raises UserError if it is not such a config, trains something else than is trained here, or lacks what a config
    must have.
    """
    raw = read_yaml(path, "file")
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        found = "keys that are no names" if isinstance(raw, dict) else shown(raw)
        raise UserError(f"file {path}: expected a mapping of keys at the top level, found {found}")
    keys = dict(_flat(raw))
    trainer = trainer or detect(raw, keys, f"file {path}")
    if trainer == "torchtune":
        keys = {key: _interpolated(value, keys) for key, value in keys.items()}
    given = Given(keys, gpus, trainer, (Path.cwd(), Path(path).absolute().parent))
    lines = _translated(given)
    _refuse_other_training(lines, f"file {path}")
    settings = _settled(lines, Path(path).stem)
    raw_config = nested(settings)
    for override in overrides:
        apply_override(raw_config, override)
    settings = _with_overrides(settings, raw_config, overrides)
    try:
        parse_config(raw_config, "its translation")
    except UserError as error:
        raise UserError(_not_valid(str(path), error, settings, lines)) from None
    translation = Translation(trainer, gpus, tuple(lines), tuple(settings))
    assert parse_yaml(translation.text(str(path)), "the text") == raw_config, "the text is not what was checked"
    return translation


def _flat(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves by dotted names."""
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in _WHOLE:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _interpolated(value: Any, keys: Mapping[str, Any]) -> Any:
    """torchtune's ${output_dir}/logs."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{([\w.]{1,100})\}", lambda found: str(keys.get(found[1], found[0])), value)


# --- each key ---------------------------------------------------------------------------------------------------------


def _translated(given: Given) -> list[Line]:
    asked = {key.lower() for key, value in given.fields.items() if not _is_unset(value)}
    defaults = {
        key: value(given.fields) if callable(value) else value
        for key, value in DEFAULTS[given.trainer].items()
        if key not in asked and not asked & set(REPLACED.get(key, ()))
    }
    # a rule may need keys that are absent: the rows of a step, accumulation
    filled = replace(given, fields={**given.fields, **defaults})
    lines = [line for key, value in given.fields.items() for line in _lines_of(key, value, filled)]
    taken = {key for line in lines for key in line.answer.values}
    for key, value in defaults.items():
        for line in _lines_of(key, value, filled):
            if line.answer.is_lost or (line.answer.values and not taken & set(line.answer.values)):
                lines.append(replace(line, is_default=True))
                taken |= set(line.answer.values)
    return lines


def _lines_of(key: str, value: Any, given: Given) -> list[Line]:
    if _is_unset(value):
        return [Line(key, value, Answer(text="empty, as if it were absent"))]
    found = lookup(key, value, given) or lost("this key is not known here, and nothing was set for it")
    if found.parts:
        return [Line(f"{key}{name}", one, answer) for name, (one, answer) in found.parts.items()]
    return [Line(key, value, found)]


def _is_unset(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, list | dict) and not value)


def _refuse_other_training(lines: Sequence[Line], where: str) -> None:
    for line in lines:
        if line.answer.is_lost and line.key in _DECISIVE:
            raise UserError(f"{where}: {line.origin} cannot be done here: {line.answer.text}; remove it if it may go")


# --- all keys together ------------------------------------------------------------------------------------------------


def _settled(lines: list[Line], stem: str) -> list[Setting]:
    """The settings, in the order of this package's sections. Changes `lines` where keys contradict each other."""
    chosen: dict[str, tuple[Any, Line]] = {}
    numbers = sorted({key.split(".")[2] for line in lines for key in line.answer.values if _is_source(key)}, key=int)
    for i, line in enumerate(lines):
        for key, value in line.answer.values.items():
            places = [f"data.train.{n}.{key.removeprefix(EACH)}" for n in numbers] if key.startswith(EACH) else [key]
            for place in places:
                if place in chosen and chosen[place][0] != value:
                    lines[i] = _contradicted(line, place, chosen[place])
                    break
                chosen.setdefault(place, (value, line))
    _settle_rules(chosen, lines)
    settings = [Setting(key, value, _comment(key, line)) for key, (value, line) in chosen.items()]
    if "run_dir" not in chosen:
        settings.append(Setting("run_dir", f"runs/{stem}", "no output_dir was given"))
    return _sorted(settings)


def _is_source(key: str) -> bool:
    return key.startswith("data.train.") and not key.startswith(EACH)


def _contradicted(line: Line, place: str, before: tuple[Any, Line]) -> Line:
    text = f"{place} is {shown(before[0])} already, from {before[1].key}"
    return replace(line, answer=replace(line.answer, text=text, is_lost=True))


def _comment(key: str, line: Line) -> str:
    how = f" ({line.answer.text})" if line.answer.text and len(line.answer.values) <= 2 else ""
    return f"{line.origin}{', the default there' if line.is_default else ''}{how}"


def _settle_rules(chosen: dict[str, tuple[Any, Line]], lines: list[Line]) -> None:
    """What one value means for another."""
    values = {key: value for key, (value, _) in chosen.items()}
    if "lora" in values:
        for key in [key for key in chosen if key.startswith("lora.")]:
            _drop(chosen, lines, key, "full fine-tuning has no adapters")
        if values.get("strategy.name") == "fsdp":
            line = chosen["strategy.name"][1]
            note = replace(line, answer=replace(line.answer, text="full fine-tuning is sharded by zero3 here"))
            chosen["strategy.name"] = "zero3", note
            chosen.pop("strategy.offload", None)
    if values.get("strategy.name") == "zero2_offload" and values.get("optim.name") != "adamw":
        line = chosen["strategy.name"][1]
        chosen["optim.name"] = "adamw", replace(line, answer=replace(line.answer, text="its states are on the host"))
    has_held_out = any(key.startswith("data.eval.") or key.endswith(".hold_out") for key in chosen)
    if "train.eval_every" in chosen and not has_held_out:
        _drop(chosen, lines, "train.eval_every", "there are no held-out data: set hold_out in a source, or data.eval")


def _drop(chosen: dict[str, tuple[Any, Line]], lines: list[Line], key: str, reason: str) -> None:
    _, line = chosen.pop(key)
    for i, one in enumerate(lines):
        if key in one.answer.values:
            is_lost = not line.is_default and not key.startswith("lora.")
            lines[i] = replace(one, answer=Answer(text=reason, is_lost=is_lost))


def _with_overrides(settings: list[Setting], raw: dict[str, Any], overrides: Sequence[str]) -> list[Setting]:
    """The settings after `--set`: a section that was changed is shown as it is now."""
    changed = [override.partition("=")[0] for override in overrides]
    result = [
        one for one in settings if not any(_is_within(one.key, key) or _is_within(key, one.key) for key in changed)
    ]
    for key in dict.fromkeys(changed):
        value: Any = raw
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        result.append(Setting(key, value, "from --set"))
    return _sorted(result)


def _is_within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _sorted(settings: list[Setting]) -> list[Setting]:
    """In the order of this package's sections."""
    order = {name: i for i, name in enumerate(RunConfig.model_fields)}
    return sorted(settings, key=lambda setting: order.get(setting.key.split(".")[0], len(order)))


def _not_valid(path: str, error: UserError, settings: Sequence[Setting], lines: Sequence[Line]) -> str:
    said = str(error)
    origins = [f"{one.key} is from {one.comment}" for one in settings if one.comment and f"{one.key}:" in said]
    gone = [f"{line.origin}: {line.answer.text}" for line in lines if line.answer.is_lost and not line.is_default]
    text = f"file {path}: {said}"
    if origins:
        text += "\n" + "\n".join(origins[:10])
    if gone:
        text += "\nnot translated:\n" + "\n".join(gone[:20])
    return text + "\nchange the file, or add what is missing with --set section.key=value"


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"


def report(translation: Translation) -> list[str]:
    """What became of each key, as lines of text."""
    made = [line for line in translation.lines if line.answer.values and not line.answer.is_lost]
    same = [line for line in translation.lines if not line.answer.values and not line.answer.is_lost]
    lines = [f"A config of {NAMES[translation.trainer]}, for {_gpus(translation.gpus)} (--gpus N for another number)."]
    lines += ["", "Translated:"]
    for line in made:
        sets = ", ".join(f"{named(key)}: {shown(value)}" for key, value in line.answer.values.items())
        how = f"  ({line.answer.text})" if line.answer.text else ""
        lines.append(f"  {line.origin}{_absent(line)} -> {sets}{how}")
    groups = (("Nothing to set:", same), ("Not translated:", translation.lost))
    for title, group in groups:
        if group:
            lines += ["", title, *(f"  {line.origin}{_absent(line)}: {line.answer.text}" for line in group)]
    return lines


def _absent(line: Line) -> str:
    return " (absent, the default there)" if line.is_default else ""
