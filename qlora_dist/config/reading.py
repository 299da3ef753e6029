"""YAML file and `--set a.b=c` overrides -> RunConfig, and back. Every mistake is a UserError that names the key."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import UserError
from .sections import RunConfig


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file and applies `a.b=c` overrides in order; values are parsed as YAML.

    Raises UserError with one line per mistake, each with the key, what was found and the nearest valid name.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: cannot be read ({error})") from None
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"config {path}: expected a mapping of sections at the top level, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], origin: str = "config") -> RunConfig:
    """Validates plain data. Raises UserError."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error, origin)) from None


def dump_yaml(config: RunConfig) -> str:
    """The resolved config as YAML; `load_config` of this text returns an equal config."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema of the config file, for editors."""
    return RunConfig.model_json_schema()


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as a number (YAML 1.1 requires 2.0e-4) and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} appears twice, again on line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override!r}: expected section.key=value, for example --set optim.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    node: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f"--set {override!r}: {'.'.join(parts[:depth])} is a list of length {len(node)}; "
                    f"expected an index from 0 to {len(node) - 1}, found {part!r}"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise UserError(f"--set {override!r}: {'.'.join(parts[:depth])} is a value, not a section")
        if depth == len(parts) - 1:
            node[index] = value
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]


def _explain(error: ValidationError, origin: str) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            siblings = _fields_at(item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), siblings, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(siblings)}"
            lines.append(f"{where}: unknown key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing; it has no default")
        else:
            message = item["msg"].removeprefix("Value error, ")
            found = "" if isinstance(item["input"], dict | BaseModel) else f" (found {item['input']!r})"
            lines.append(f"{where}: {message}{found}" if where else message)
    return f"{origin}: " + "\n".join(dict.fromkeys(lines))


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at a location such as ('data', 'train', 0)."""
    model: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        model = _section_of(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_of, getattr(annotation, "__args__", ()))), None)
