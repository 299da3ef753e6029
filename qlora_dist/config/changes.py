"""Whether two resolved configs are of one run: which leaves differ, and which of them may."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import UserError, shortened
from .reading import BoundedLoader
from .sections import RunConfig

# Fields that may differ between two starts of a run: they affect memory, speed or reports, not the mathematics.
FREE_FIELDS = (
    "run_dir",
    "device",
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


def free_fields(config: RunConfig) -> tuple[str, ...]:
    """Fields that may change between two starts of this run, besides FREE_FIELDS."""
    # with a constant rate the length of a run does not affect its steps: it may be extended
    return ("train.steps", "train.epochs") if config.optim.schedule == "constant" else ()


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
        line
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == field or key.startswith(field + ".") for field in free)
        and not (key in by_content and _without_paths(old.get(key)) == _without_paths(new.get(key)))
        for line in _changed_leaves(key, old.get(key), new.get(key))
    ]


def _changed_leaves(key: str, old: Any, new: Any) -> list[str]:
    """One line per leaf that differs; a list of sources of another length is one leaf."""
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(old, dict) and isinstance(new, dict):
        inner = [(name, old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())]
    elif (
        isinstance(old, list)
        and isinstance(new, list)
        and len(old) == len(new)
        and all(isinstance(one, dict) for one in (*old, *new))
    ):
        inner = [(str(i), *pair) for i, pair in enumerate(zip(old, new, strict=True))]
    if not inner:
        return [f"  {key}: was {shortened(old)}, now {shortened(new)}"]
    return [line for name, one, two in inner if one != two for line in _changed_leaves(f"{key}.{name}", one, two)]


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
        old = resolved_leaves(saved)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{origin} is damaged: it is not the config of a run ({shortened(str(error))}). Restore it; if it is a "
            "config.yaml beside checkpoints it may be deleted instead: they hold the config, too"
        ) from None
    new = resolved_leaves(current)
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


def resolved_leaves(text: str) -> dict[str, Any]:
    """The leaves of a config with today's defaults for the fields that it lacks, except train.eval_rows. A value that
    today's fields do not take (another version wrote it) stands for itself."""
    raw = _parsed(text)
    if not isinstance(raw, dict):
        raise ValueError(f"expected a mapping of sections, found {type(raw).__name__}")
    foreign: dict[str, Any] = {}
    copy = json.loads(json.dumps(raw))
    if isinstance(copy.get("train"), dict) and "eval_rows" not in copy["train"] and is_dumped(text):
        copy["train"]["eval_rows"] = "all"  # as versions before there was this key did
    while True:
        try:
            return _flatten(json.loads(RunConfig.model_validate(copy).model_dump_json())) | foreign
        except ValidationError as error:
            # all are found before one is removed: two may be about the same value
            found = dict(filter(None, (_find(copy, item["loc"]) for item in error.errors())))
        if not found:  # sections are missing
            return _flatten(raw)
        foreign |= {key: section.pop(name) for key, (section, name) in found.items()}


@functools.lru_cache(maxsize=16)  # a start compares the same few texts again and again
def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=BoundedLoader)


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


def is_dumped(text: str) -> bool:
    """Whether a config was written by this package and not by hand."""
    return yaml.safe_dump(_parsed(text), sort_keys=False, allow_unicode=True) == text


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
        return {name: leaf for key, inner in items for name, leaf in _flatten(inner, key).items()}
    return {prefix: value}
