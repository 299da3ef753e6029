"""Turns of a conversation, and what stands beside them in every format: system prompt, history, tools, switches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import shortened
from .fields import (
    BadRecord,
    Conversation,
    Message,
    Record,
    list_field,
    object_in,
    optional_text,
    parse_json,
    refuse_fields,
    text_field,
    type_name,
)

# Names that other trainers give to "is this turn learned?": OpenAI's and, for example, axolotl's and ms-swift's
_SWITCHES = ("weight", "train", "training", "trainable", "loss", "loss_mask")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_IN_A_TURN = {
    "tools": "tools belong beside the messages",
    "functions": "functions belong beside the messages",
    "mask": "it may mean learned or hidden; name it weight: 1 (learned) or 0 (not learned)",
    "train_detail": "parts of a turn cannot be switched",
    "training_detail": "parts of a turn cannot be switched",
}


def conversation(record: Record, turns: Sequence[Message]) -> Conversation:
    """Turns in order, with the record's system prompt, earlier turns (as context) and tools."""
    head, own = list(turns[:1]), list(turns[1:])
    if not head or head[0]["role"] != "system":
        head, own = [], list(turns)
    system = _system_field(record)
    if system and head and head[0]["content"] != system:
        raise BadRecord(
            f"the record's system prompt is {shortened(system)}, but its first message has another: "
            f"{shortened(head[0]['content'])}; keep one"
        )
    if system and not head:
        head = [{"role": "system", "content": system}]
    return Conversation(check_roles([*head, *_history_field(record), *own]), tools_field(record))


def prompt_and_answer(record: Record, prompt: str, extra: str, answer: str) -> Conversation:
    """One question, one answer. `extra` (Alpaca's input) is also kept separate for templates that need it."""
    user: Message = {"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt}
    if extra:
        user |= {"instruction": prompt, "input": extra}
    return conversation(record, [user, {"role": "assistant", "content": answer}])


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


# --- beside the turns ---


def _system_field(record: Record) -> str:
    names = ("system", "system_prompt")
    found = {text for name in names if (text := optional_text(record, name))}
    if len(found) > 1:
        raise BadRecord("fields system and system_prompt are different texts; keep one")
    return found.pop() if found else ""


def _history_field(record: Record) -> list[Message]:
    """Turns before this one, as pairs [question, answer] or messages. They are context: none is learned."""
    if record.get("history") in (None, "", []):
        return []
    turns: list[Message] = []
    for i, turn in enumerate(list_field(record, "history")):
        where = f"history[{i}]"
        if isinstance(turn, Mapping):
            turns.append(openai_message(record, turn, where))
        elif isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        else:
            raise BadRecord(f"field {where} is {shortened(turn)}, expected a pair [question, answer] of texts")
    return as_context(turns)


def as_context(turns: Sequence[Message]) -> list[Message]:
    """Turns whose answers are not learned, unless a switch of their own says so."""
    return [{"weight": 0, **turn} if turn["role"] == "assistant" else turn for turn in turns]


def tools_field(record: Record) -> list[dict[str, Any]] | None:
    """The functions a model may call: a list, or JSON text of one. Bare functions get OpenAI's wrapper."""
    value = record.get("tools") or record.get("functions")
    if isinstance(value, str):
        if not value.strip():
            return None
        value = parse_json(value, "tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRecord(f"field tools is {type_name(value)}, expected a list of objects or JSON text of one")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in value]


# --- one turn ---

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def openai_messages(record: Record, field: str) -> list[Message]:
    """Messages in the form of OpenAI's API -> in the form of transformers' chat templates."""
    return [openai_message(record, turn, f"{field}[{i}]") for i, turn in enumerate(list_field(record, field))]


def openai_message(record: Record, value: Any, where: str) -> Message:
    turn = object_in(record, value, where, "an object with role and content")
    role = text_field(turn, "role", where)
    if role not in OPENAI_ROLES:
        raise BadRecord(f"field {where}.role is {shortened(role)}, expected one of {', '.join(OPENAI_ROLES)}")
    message: Message = {"role": OPENAI_ROLES[role]}
    calls = turn.get("tool_calls")
    if turn.get("function_call"):  # OpenAI's predecessor of tool_calls
        calls = [{"function": turn["function_call"]}]
    if calls:
        if not isinstance(calls, list | tuple):
            raise BadRecord(f"field {where}.tool_calls is {type_name(calls)}, expected a list")
        message["tool_calls"] = [openai_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    message["content"] = "" if turn.get("content") is None and calls else _content(turn, where)
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            message[key] = _name_or_number(turn, key, where)
    return message | settings_of_turn(turn, message["role"], where)


def settings_of_turn(turn: Record, role: str, where: str) -> Message:
    """weight (0: not learned) and reasoning_content of a turn, if it has them, in every format with turns."""
    refuse_fields(turn, where, _IN_A_TURN)
    settings: Message = {}
    for key in _SWITCHES:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRecord(
                f"field {where}.{key} is {shortened(value)}, expected 0 or false (not learned), or 1 or true"
            )
        if value and role != "assistant":
            raise BadRecord(
                f"field {where}.{key} is {value!r}, but only answers can be switched, and this is a message of role "
                f"{role}; remove it (data.learn=all learns everything)"
            )
        if settings.setdefault("weight", int(value)) != value:
            raise BadRecord(f"field {where} has switches that contradict each other; keep one of {_SWITCHES}")
    if role != "assistant":
        settings.pop("weight", None)
    for key in _REASONING:
        text = optional_text(turn, key, where)
        if text and role != "assistant":
            raise BadRecord(f"field {where}.{key} is set, but only answers have reasoning")
        if text and settings.setdefault("reasoning_content", text) != text:
            raise BadRecord(f"field {where} has two different texts of reasoning; keep one of {_REASONING}")
    return settings


def _name_or_number(turn: Record, key: str, where: str) -> str | int:
    value = turn[key]
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise BadRecord(f"field {where}.{key} is {type_name(value)}, expected text")
    return value


def _content(turn: Record, where: str) -> str:
    """Text, or OpenAI's list of parts if all are text."""
    parts = turn.get("content")
    if not isinstance(parts, list | tuple):
        return text_field(turn, "content", where)
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise BadRecord(f"field {where}.content[{i}] is not text; only text can be learned")
    return "".join(text_field(part, "text", f"{where}.content[{i}]") for i, part in enumerate(parts))


def openai_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise BadRecord(f"field {where} has no function object")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI sends JSON text, transformers' templates expect the object
        arguments = parse_json(arguments or "{}", f"{where}.function.arguments")
    result = {
        "type": "function",
        "function": {"name": text_field(function, "name", where), "arguments": {} if arguments is None else arguments},
    }
    return result | ({"id": _name_or_number(call, "id", where)} if call.get("id") is not None else {})
