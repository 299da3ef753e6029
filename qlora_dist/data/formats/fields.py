"""What a format function returns, and how it reads the fields of a record. Errors name the field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import shortened
from ..templates import BadRecord
from . import json_text

Record = Mapping[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages with roles system, user, assistant, tool; keys as in transformers' chat templates."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Text:
    """A document for continued pretraining: everything is learned.

    A document too large for one record comes in parts; only the first part starts it and only the last ends it.
    """

    text: str
    is_first: bool = True
    is_last: bool = True


@dataclass(frozen=True)
class Tokens:
    """Token ids from elsewhere, with their label mask."""

    input_ids: list[int]
    is_label: list[bool]


Document = Conversation | Text | Tokens


# --- fields ---


class Fields(Mapping[str, Any]):
    """A record, or an object inside one, that remembers which of its fields were asked for."""

    def __init__(self, values: Mapping[str, Any], name: str = "") -> None:
        """`name`: of an object inside a record, as in `messages[]`."""
        self._values = values
        self._name = name
        self._asked: set[str] = set()
        self._inner: list[Fields] = []

    def __getitem__(self, field: str) -> Any:
        self._asked.add(field)
        return self._values[field]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> set[str]:
        """Fields with a value that nobody asked for, with those of inner objects (`messages[].refusal`)."""
        prefix = f"{self._name}." if self._name else ""
        names = {
            f"{prefix}{field}"
            for field, value in self._values.items()
            if value is not None and field not in self._asked
        }
        return names.union(*(inner.unread() for inner in self._inner))


def object_in(record: Record, value: Any, where: str, expected: str = "an object") -> Record:
    """An object inside a record; its unread fields count as the record's. Raises BadRecord if it is none."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"field {where} is {type_name(value)}, expected {expected}")
    fields = Fields(value, f"{where.partition('[')[0]}[]")
    if isinstance(record, Fields):
        record._inner.append(fields)
    return fields


def type_name(value: Any) -> str:
    """A value's type in the data's terms, not Python's."""
    if value is None:
        return "null"
    names = {
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def text_field(record: Record, field: str, where: str = "") -> str:
    name = f"{where}.{field}" if where else field
    if field not in record:
        raise BadRecord(f"field {name} is missing; this record has {', '.join(map(str, record)) or 'no fields'}")
    value = record[field]
    if not isinstance(value, str):
        raise BadRecord(f"field {name} is {type_name(value)}, expected text")
    return value


def optional_text(record: Record, field: str, where: str = "") -> str:
    return "" if record.get(field) is None else text_field(record, field, where)


def list_field(record: Record, field: str) -> Sequence[Any]:
    if field not in record:
        raise BadRecord(f"field {field} is missing; this record has {', '.join(map(str, record)) or 'no fields'}")
    value = record[field]
    if not isinstance(value, list | tuple):
        raise BadRecord(f"field {field} is {type_name(value)}, expected a list")
    if not value:
        raise BadRecord(f"field {field} is an empty list")
    return value


def parse_json(value: str, where: str) -> Any:
    try:
        return json_text.decode(value)
    except ValueError as error:
        raise BadRecord(f"field {where} is {json_text.explain(error)}") from None


# Fields for which this package has no use, but without which the rest would mean something else
_MEDIA = ("images", "image", "audios", "audio", "videos", "video", "pixel_values")
_NOT_HONOURED = {
    **dict.fromkeys(_MEDIA, "only text can be learned"),
    "chat_template_kwargs": "options of a chat template cannot be set per record; put what they choose into the text",
}


def refuse_fields(record: Record, where: str = "", more: Mapping[str, str] | None = None) -> None:
    """Raises BadRecord for a field that changes the meaning and cannot be honoured. `more`: field -> reason."""
    for field, reason in (_NOT_HONOURED | dict(more or {})).items():
        if field in record and record[field] not in (None, "", [], {}):
            name = f"{where}.{field}" if where else field
            raise BadRecord(f"field {name} is {shortened(record[field])}: {reason}; remove the field or the record")


def check_text(document: Document) -> None:
    """Raises BadRecord for halves of surrogate pairs: they are no characters, and no tokenizer takes them."""
    pending: list[Any] = [document.text] if isinstance(document, Text) else []
    if isinstance(document, Conversation):
        pending = [document.messages, document.tools]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                around = value[max(0, error.start - 20) : error.start + 20]
                raise BadRecord(
                    f"{shortened(around)} contains half of a surrogate pair ({value[error.start]!a}), which is no "
                    "character; it was cut or decoded incorrectly"
                ) from None
