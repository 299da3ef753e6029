"""A config as YAML with a comment on each line: what it came from, or what it means."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..errors import printable
from .reading import _Dumper

WIDTH = 120
COLUMN = 40  # of comments
_NO_YAML = re.compile("[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Setting:
    """A value, by its dotted key, and why it has it."""

    key: str
    value: Any
    comment: str = ""


def nested(settings: Sequence[Setting]) -> dict[str, Any]:
    """Plain data of the dotted keys; numbers in them are places in a list."""
    raw = _Section()
    for setting in settings:
        node: Any = raw
        *above, last = setting.key.split(".")
        for part in above:
            node = node.setdefault(part, _Section())
        node[last] = setting.value
    return {key: _plain(value) for key, value in raw.items()}


class _Section(dict[str, Any]):
    """Made here, unlike a mapping that is a value."""


def _plain(value: Any) -> Any:
    if not isinstance(value, _Section):
        return value
    inner = {key: _plain(one) for key, one in value.items()}
    return list(inner.values()) if all(key.isdigit() for key in inner) else inner


def commented_yaml(settings: Sequence[Setting], header: Sequence[str] = (), footer: Sequence[str] = ()) -> str:
    """YAML of the settings, grouped by section in the order in which each first appears. `header`, `footer`: lines."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.key.split(".")[0], []).append(setting)
    lines = [_comment(line) for line in header]
    for name, group in groups.items():
        if len(group) == 1 and group[0].key == name:
            lines.append(_line(name, group[0].value, group[0].comment))
        else:
            lines += [f"{name}:", *_section(group, 2, name)]
    return "\n".join([*lines, *(_comment(line) for line in footer)]) + "\n"


def _section(group: Sequence[Setting], indent: int, prefix: str) -> list[str]:
    lines: list[str] = []
    sources: dict[str, dict[str, list[Setting]]] = {}
    for setting in group:
        rest = setting.key.removeprefix(f"{prefix}.").split(".")
        if len(rest) == 1:
            lines.append(_line(rest[0], setting.value, setting.comment, " " * indent))
        else:
            sources.setdefault(rest[0], {}).setdefault(rest[1], []).append(setting)
    for name, entries in sources.items():
        lines.append(f"{' ' * indent}{name}:")
        for settings in entries.values():
            for i, one in enumerate(settings):
                lead = f"{' ' * (indent + 2)}{'- ' if i == 0 else '  '}"
                lines.append(_line(one.key.rsplit(".", 1)[1], one.value, one.comment, lead))
    return lines


def _line(key: str, value: Any, comment: str, lead: str = "") -> str:
    text = f"{lead}{key}: {_flow(value)}"
    comment = _clean(comment)
    if not comment:
        return text
    if max(COLUMN, len(text)) + 4 + len(comment) <= WIDTH:
        return f"{text:<{COLUMN}}  # {comment}"
    indent = " " * len(lead)
    return "\n".join([*textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
                                     break_long_words=False, break_on_hyphens=False), text])  # fmt: skip


def _flow(value: Any) -> str:
    """YAML on one line."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=2**20, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(line: str) -> str:
    return f"# {_clean(line)}".rstrip()


def _clean(text: str) -> str:
    """On one line, without what a YAML file cannot have, not even in comments."""
    return _NO_YAML.sub("?", " ".join(printable(text).split(" "))).replace("\n", " ").replace("\t", " ")
