"""The config reference, from the JSON schema that `qlora-dist schema` prints."""

from __future__ import annotations

from typing import Any

from docs.parts.markdown import code, prose, table
from qlora_dist.config import json_schema

_LARGE = 1e4  # bounds above it are those of file formats, and tell a reader nothing
_SOURCES = "data.train[] and data.eval[]"
_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}


def config() -> str:
    """A table for each section, in the order of the schema; the data sources follow the section data."""
    schema = json_schema()
    sections = {"top level": schema}
    for name, field in schema["properties"].items():
        section = _section(schema, field)
        if section is not None:
            sections[name] = section
        if name == "data":
            sections[_SOURCES] = schema["$defs"]["SourceConfig"]
    parts = []
    for name, section in sections.items():
        prefix = "" if name in ("top level", _SOURCES) else f"{name}."
        title = "Top level" if name == "top level" else code(name)
        parts.append(f"## {title}\n\n{_table(section, schema, prefix)}")
    return "\n\n".join(parts)


def _table(section: dict[str, Any], schema: dict[str, Any], prefix: str) -> str:
    required = section.get("required", [])
    rows = []
    for key, field in section["properties"].items():
        name = f"{prefix}{key}"
        if _section(schema, field) is not None:
            default = "required" if key in required else "its defaults"
            rows.append((f"[`{name}`](#{key})", "section", default, prose(field.get("description", ""))))
        else:
            default = "required" if key in required else code(_yaml(field.get("default")))
            rows.append((code(name), _type(field, schema), default, prose(field.get("description", ""))))
    return table(("key", "type", "default", "meaning"), rows)


def _section(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a field is, also where it may be null."""
    for one in (field, *field.get("anyOf", ())):
        if "$ref" in one:
            found: dict[str, Any] = schema["$defs"][one["$ref"].rsplit("/", 1)[-1]]
            return found
    return None


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(one, schema) for one in field["anyOf"])
    if "$ref" in field:
        return "source"
    if "const" in field:
        return code(field["const"])
    if "enum" in field:
        return ", ".join(code(one) for one in field["enum"])
    kind = field.get("type")
    if kind == "null":
        return "`null`"
    if kind == "object":
        return "mapping of names"
    if kind == "array":
        parts = field.get("prefixItems")
        return f"list of {len(parts)}: {_type(parts[0], schema)}" if parts else f"list: {_type(field['items'], schema)}"
    return " ".join(filter(None, (_WORDS[str(kind)], _bounds(field))))


def _bounds(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join(f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field and field[key] < _LARGE)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return "{}" if value == {} else f"{value:g}" if isinstance(value, float) else str(value)
