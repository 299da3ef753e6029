"""YAML file and `--set a.b=c` overrides -> RunConfig, and back. Every mistake is a UserError that names the key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import UserError, shortened
from .json_file import regular_bytes
from .mistakes import explain, found
from .sections import RunConfig

# PyYAML is linear in the size of what it reads once aliases and numbers are bounded: seconds for the largest config
MAX_BYTES = 2**18  # of a file; also of what its aliases expand to
MAX_NUMBER = 100  # characters of a number, date or truth value
_ADVICE = {  # what PyYAML says -> what to do
    "'\\t'": "indent with spaces, YAML takes no tabs",
    "expected <block end>": "is it indented like the lines that it belongs to?",
    "mapping values are not allowed": "text that holds ': ' needs quotes; a key needs a space after its colon, and the "
    "indentation of the keys beside it",
}


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file and applies `a.b=c` overrides in order; values are parsed as YAML.

    Raises UserError with one line per mistake, each with the key, what was found and the nearest valid name.
    """
    raw = read_config(path)
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, str(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """Plain data of a config file, not validated. Raises UserError."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        what = "nothing: the file is empty" if raw is None else found(raw)
        raise UserError(
            f"config {path}: expected a mapping of sections at the top level (run_dir, model, data, ...), found {what}"
        )
    return raw


def read_yaml(path: str | Path, what: str = "config") -> Any:
    """Plain data of a YAML file, in bounded time and memory. Raises UserError, which names the file as `what`."""
    where = f"{what} {path}"
    advice = "; expected a YAML file, qlora-dist init writes a first one" if what == "config" else ""
    try:
        text = regular_bytes(path, MAX_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(f"{where}: cannot be read ({reason}){advice}") from None
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data of YAML text. Raises UserError whose text starts with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        problem = str(error.problem or error.context)
        advice = next((f"; {words}" for sign, words in _ADVICE.items() if sign in problem), "")
        raise UserError(f"{where}: not valid YAML: {place}{problem[:300]}{advice}") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors let Python's own errors out: !!int x, !!bool x, 2024-99-99
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: not valid YAML: {reason or type(error).__name__}") from None


def parse_config(raw: dict[str, Any], origin: str = "config") -> RunConfig:
    """Validates plain data. Raises UserError."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, origin, raw)) from None


def dump_yaml(config: RunConfig) -> str:
    """The resolved config as YAML; `load_config` of this text returns an equal config."""
    return yaml.dump(json.loads(config.model_dump_json()), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema of the config file, for editors."""
    return RunConfig.model_json_schema()


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys, and takes bounded time and memory."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _expanded_size(node, {}) > MAX_BYTES:
            raise yaml.YAMLError(f"its aliases (*name) expand to more than {MAX_BYTES:,} characters")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":str") and len(node.value) > MAX_NUMBER:
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: a number of {len(node.value):,} characters; expected at most "
                f"{MAX_NUMBER}, or text in quotes"
            )
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # not hashable: refused below
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {shortened(key_node.value)} appears twice, again on line {line}; keep one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Loader(BoundedLoader):
    """One that reads 2e-4 as a number (YAML 1.1 requires 2.0e-4), and only true and false as truth values: off, no and
    yes are words that keys take."""


def _expanded_size(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters and nodes below a node, each alias counted as what it stands for. `known`: sizes by id of a node."""
    if id(node) not in known:
        known[id(node)] = MAX_BYTES + 1  # an alias to a node that contains it has no end
        if isinstance(node, yaml.ScalarNode):
            known[id(node)] = 1 + len(node.value)
        else:
            inner = [one for entry in node.value for one in (entry if isinstance(entry, tuple) else (entry,))]
            known[id(node)] = 1 + sum(_expanded_size(one, known) for one in inner)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """Quotes what _Loader would read as a number, such as the commit 1234567e8."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in BoundedLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def apply_override(raw: dict[str, Any], override: str) -> None:
    where = f"--set {shortened(override)}"
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{where}: expected section.key=value, for example --set optim.lr=1e-4")
    set_value(raw, key, parse_yaml(text, f"{where}: the value"), where)


def set_value(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets the value at a dotted key, such as data.train.0.path. Raises UserError whose text starts with `where`."""
    node: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            # isdigit alone would pass superscripts, int alone -1 and thousands of digits
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
                raise UserError(
                    f"{where}: {'.'.join(parts[:depth])} is a list of length {len(node)}; "
                    f"expected an index from 0 to {len(node) - 1}, found {shortened(part)}"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise UserError(f"{where}: {'.'.join(parts[:depth])} is a value, not a section")
        if depth == len(parts) - 1:
            node[index] = value
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]
