"""What a format function returns, and how it reads the fields of a record. Errors name the field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..templates import BadRecord

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


def optional_text(record: Record, field: str) -> str:
    return "" if record.get(field) is None else text_field(record, field)


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
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRecord(f"field {where} is not valid JSON: {error}") from None


# --- conversations ---


def prompt_and_answer(prompt: str, extra: str, answer: str, system: str = "") -> Conversation:
    """One question, one answer. `extra` (Alpaca's input) is also kept separate for templates that need it."""
    user: Message = {"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt}
    if extra:
        user |= {"instruction": prompt, "input": extra}
    head: list[Message] = [{"role": "system", "content": system}] if system else []
    return Conversation([*head, user, {"role": "assistant", "content": answer}])


def check_roles(turns: list[Message]) -> list[Message]:
    """Rejects a conversation out of order: system comes first if at all, then questions and answers alternate."""
    previous = None
    for i, turn in enumerate(turns):
        role = turn["role"]
        if role == "system" and i > 0:
            raise BadRecord(f"message {i + 1} has role system, which only the first may have")
        if role == "tool" and previous not in ("assistant", "tool"):
            raise BadRecord(f"message {i + 1} is a tool result, but does not follow an assistant message")
        if role == "user" and previous == "user":
            raise BadRecord(f"messages {i} and {i + 1} both have role user; expected an answer between them")
        if role == "assistant" and previous in (None, "system"):
            raise BadRecord(f"message {i + 1} has role assistant, but follows no user message")
        if role == "assistant" and previous == "assistant":
            raise BadRecord(f"messages {i} and {i + 1} both have role assistant; expected a question between them")
        previous = role
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRecord("no assistant message: nothing to learn")
    return turns
