"""All formats by name, and the detection of a source's format from its columns, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...errors import UserError, shortened
from . import chats, instructions
from .fields import BadRecord, Conversation, Document, Fields, Record, Text, check_text, refuse_fields, type_name
from .files import RawRecord

FORMATS: dict[str, Callable[[Record], Document | list[Conversation]]] = {
    "alpaca": instructions.alpaca,
    "alpaca-cleaned": instructions.alpaca,
    "alpaca-gpt4": instructions.alpaca,
    "messages": chats.messages,
    "sharegpt": chats.sharegpt,
    "oasst": chats.oasst,
    "guanaco": chats.guanaco,
    "self-instruct": instructions.self_instruct,
    "chip2": chats.chip2,
    "hh-rlhf": chats.hh_rlhf,
    "longform": instructions.longform,
    "dolly": instructions.dolly,
    "unnatural-instructions": instructions.unnatural_instructions,
    "input-output": instructions.input_output,
    "prompt-completion": instructions.prompt_completion,
    "text": instructions.text,
    "tokens": instructions.pretokenized,
}


def convert(format_name: str, raw: RawRecord, columns: Mapping[str, str]) -> tuple[list[Document], set[str]]:
    """The documents of a record, and the names of its fields that have a value but no use.

    Raises BadRecord, whatever is wrong with the record.
    """
    if raw.fields is None:
        raise BadRecord(raw.problem or "no fields")
    record = Fields(map_columns(raw.fields, columns))
    try:
        refuse_fields(record)
        converted = FORMATS[format_name](record)
        if isinstance(converted, Text):
            converted = Text(converted.text, raw.is_first, raw.is_last)
        documents: list[Document] = [*converted] if isinstance(converted, list) else [converted]
        for document in documents:
            check_text(document)
    except BadRecord:
        raise
    except Exception as error:  # the last net: one odd record must not end the run with a traceback
        raise BadRecord(f"cannot be read as {format_name} ({type(error).__name__}: {shortened(str(error))})") from error
    return documents, record.unread()


# the first matching rule decides: (format, columns, test of the values, description of the test)
_Test = Callable[[Mapping[str, Any]], bool]
_RULES: list[tuple[str, tuple[str, ...], _Test | None, str]] = [
    ("tokens", ("input_ids",), lambda r: isinstance(r["input_ids"], list), "a list"),
    ("messages", ("messages",), lambda r: isinstance(r["messages"], list), "a list"),
    ("sharegpt", ("conversations",), lambda r: isinstance(r["conversations"], list), "a list"),
    ("oasst", ("prompt",), lambda r: isinstance(r["prompt"], Mapping) and "replies" in r["prompt"], "a tree"),
    ("oasst", ("message_id", "parent_id", "role", "text"), None, ""),
    ("hh-rlhf", ("chosen", "rejected"), None, ""),
    (
        "unnatural-instructions",
        ("instances",),
        lambda r: _first_has(r["instances"], "instruction_with_input"),
        "with instruction_with_input",
    ),
    ("self-instruct", ("instruction", "instances"), None, ""),
    ("alpaca", ("instruction", "output"), None, ""),
    ("dolly", ("instruction", "response"), None, ""),
    ("longform", ("input", "output", "source", "subset"), None, ""),
    ("input-output", ("input", "output"), None, ""),
    (
        "self-instruct",
        ("prompt", "completion"),
        lambda r: isinstance(r["completion"], str) and r["completion"].endswith("<|endoftext|>"),
        "ending with a literal <|endoftext|>",
    ),
    ("prompt-completion", ("prompt", "completion"), None, ""),
    ("guanaco", ("text",), lambda r: _starts_with(r["text"], "### Human:"), "starting with '### Human:'"),
    ("chip2", ("text",), lambda r: _starts_with(r["text"], "<human>:"), "starting with '<human>:'"),
    ("text", ("text",), None, ""),
]


def detect_format(record: Mapping[str, Any], path: str) -> tuple[str, str]:
    """The format and the reason, for the log. Raises UserError if no rule matches."""
    for name, columns, test, description in _RULES:
        if all(column in record for column in columns) and (test is None or test(record)):
            plural = "column" if len(columns) == 1 else "columns"
            return name, f"{plural} {', '.join(columns)}{' ' + description if description else ''}"
    found = ", ".join(f"{name} ({type_name(value)})" for name, value in record.items()) or "none"
    raise UserError(
        f"data source {path}: cannot detect the format from the columns: {found}; set format to one of "
        f"{', '.join(FORMATS)}; or map your columns to a format's, for example "
        "columns: {instruction: question, output: answer}"
    )


def map_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Renames the user's columns to a format's. `columns`: format's name -> user's name; others are kept."""
    if not columns:
        return dict(record)
    mapped = {name: value for name, value in record.items() if name not in columns.values()}
    return mapped | {name: record[own] for name, own in columns.items() if own in record}


def check_columns(record: Mapping[str, Any], columns: Mapping[str, str], source: str) -> None:
    """Raises UserError for a column that is mapped to another one, which a source's first record lacks, while it has
    the column itself: that would be read, against what the config says."""
    for name, own in columns.items():
        if own not in record and name in record:
            raise UserError(
                f"data source {source}: columns says that {name} is called {shortened(own)}, but the first record has "
                f"{name} and no {shortened(own)}; correct it, or leave {name} out of columns"
            )


def group_records(format_name: str, records: Iterator[RawRecord]) -> Iterator[RawRecord]:
    """Joins records that form one document: OASST's messages -> trees. Other formats pass through."""
    if format_name != "oasst":
        yield from records
        return
    flat: list[RawRecord] = []
    for raw in records:
        if raw.fields is not None and "message_id" in raw.fields and "replies" not in raw.fields:
            flat.append(raw)
        else:
            yield raw
    yield from _trees(flat)


def _trees(flat: Sequence[RawRecord]) -> Iterator[RawRecord]:
    """The trees of the messages; a message that belongs to none comes with the reason."""
    nodes: dict[str | int, tuple[RawRecord, dict[str, Any]]] = {}
    for raw in flat:
        assert raw.fields is not None
        name, parent = raw.fields["message_id"], raw.fields.get("parent_id")
        if not isinstance(name, str | int) or not isinstance(parent, str | int | None):
            found = f"{type_name(name)} and {type_name(parent)}"
            yield RawRecord(None, raw.where, f"fields message_id and parent_id are {found}, expected texts")
        elif name in nodes:
            yield RawRecord(None, raw.where, f"message_id {shortened(name)} is also that of {nodes[name][0].where}")
        else:
            nodes[name] = raw, dict(raw.fields, replies=[])
    roots = []
    for raw, node in nodes.values():
        parent = node.get("parent_id")
        if parent is None:
            roots.append((raw, node))
        elif parent in nodes:
            nodes[parent][1]["replies"].append(node)
        else:
            yield RawRecord(None, raw.where, f"parent_id {shortened(parent)} is not in the data")
    in_tree: set[str | int] = set()
    pending = [node for _, node in roots]
    while pending:
        node = pending.pop()
        in_tree.add(node["message_id"])
        pending += node["replies"]
    for raw, node in nodes.values():
        if node["message_id"] not in in_tree and node["parent_id"] in nodes:
            yield RawRecord(
                None, raw.where, "its chain of parent_id ends at no first message, but in a circle or a gap"
            )
    for raw, node in roots:
        yield RawRecord({"prompt": node}, raw.where)


def _starts_with(value: Any, text: str) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(text)


def _first_has(value: Any, field: str) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and field in value[0]
