"""Multi-turn formats: OpenAI messages, ShareGPT, OASST trees, hh-rlhf, Guanaco and chip2 texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .fields import (
    BadRecord,
    Conversation,
    Message,
    Record,
    check_roles,
    list_field,
    optional_text,
    parse_json,
    text_field,
    type_name,
)


def messages(record: Record) -> Conversation:
    """OpenAI chat: messages with role and content, tools, tool_calls and tool results."""
    turns = openai_messages(list_field(record, "messages"), "messages")
    return Conversation(check_roles(turns), tools_field(record))


def openai_messages(turns: Sequence[Any], field: str) -> list[Message]:
    """Messages in the form of OpenAI's API -> in the form of transformers' chat templates."""
    return [_openai_message(turn, f"{field}[{i}]") for i, turn in enumerate(turns)]


SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def sharegpt(record: Record) -> Conversation:
    """conversations with from (human, gpt, system, function_call, observation) and value; tools, system."""
    turns = list_field(record, "conversations")
    system = optional_text(record, "system")
    result: list[Message] = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        if not isinstance(turn, Mapping):
            raise BadRecord(f"field {where} is {type_name(turn)}, expected an object with from and value")
        sender = text_field(turn, "from", where)
        if sender not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise BadRecord(f"field {where}.from is {sender!r}, expected one of {known}")
        value = text_field(turn, "value", where)
        if sender == "function_call":
            result.append({"role": "assistant", "content": "", "tool_calls": _calls_of(value, where)})
        else:
            result.append({"role": SHAREGPT_ROLES[sender], "content": value})
    return Conversation(check_roles(result), tools_field(record))


def hh_rlhf(record: Record) -> Conversation:
    """chosen: text like '\\n\\nHuman: ...\\n\\nAssistant: ...', or a list of messages. rejected is unused."""
    if isinstance(record.get("chosen"), list):
        return Conversation(check_roles(openai_messages(list_field(record, "chosen"), "chosen")))
    return _split_turns(text_field(record, "chosen"), "chosen", _HH_TURN)


def guanaco(record: Record) -> Conversation:
    """text like '### Human: ...### Assistant: ...' (openassistant-guanaco)."""
    return _split_turns(text_field(record, "text"), "text", _GUANACO_TURN)


def chip2(record: Record) -> Conversation:
    """text like '<human>: ...\\n<bot>: ...' (OIG's unified_chip2)."""
    return _split_turns(text_field(record, "text"), "text", _CHIP2_TURN)


def oasst(record: Record) -> Conversation:
    """A tree of messages with replies: the path of best-ranked replies, up to the last answer on it."""
    node: Any = record.get("prompt", record)
    path: list[Message] = []
    while True:
        if not isinstance(node, Mapping):
            raise BadRecord(f"field prompt or one of its replies is {type_name(node)}, expected a message object")
        role = text_field(node, "role")
        if role not in _OASST_ROLES:
            raise BadRecord(f"a message has role {role!r}, expected prompter or assistant")
        path.append({"role": _OASST_ROLES[role], "content": text_field(node, "text")})
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        if not replies:
            break
        # rank 0 is the best; without ranks, the first reply is used
        node = min(replies, key=lambda r: r["rank"] if r.get("rank") is not None else float("inf"))
    if path[-1]["role"] == "user":
        path.pop()
    return Conversation(check_roles(path))


_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_GUANACO_TURN = re.compile(r"(?:^|\s*)### (Human|Assistant):")
_CHIP2_TURN = re.compile(r"(?:^|\n)<(human|bot)>:")


def _split_turns(value: str, field: str, pattern: re.Pattern[str]) -> Conversation:
    before, *pieces = pattern.split(value)
    if before.strip() or not pieces:
        raise BadRecord(f"field {field} starts with {value[:30]!r}, expected a turn that matches {pattern.pattern}")
    turns: list[Message] = []
    for speaker, content in zip(pieces[::2], pieces[1::2]):
        role = "user" if speaker.lower() == "human" else "assistant"
        turns.append({"role": role, "content": content.strip()})
    return Conversation(check_roles(turns))


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


OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def _openai_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRecord(f"field {where} is {type_name(turn)}, expected an object with role and content")
    role = text_field(turn, "role", where)
    if role not in OPENAI_ROLES:
        raise BadRecord(f"field {where}.role is {role!r}, expected one of {', '.join(OPENAI_ROLES)}")
    message: Message = {"role": OPENAI_ROLES[role]}
    calls = turn.get("tool_calls")
    if turn.get("function_call"):  # OpenAI's predecessor of tool_calls
        calls = [{"function": turn["function_call"]}]
    if calls:
        message["tool_calls"] = [_openai_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if turn.get("content") is None and calls:
        message["content"] = ""
    else:
        message["content"] = _content(turn, where)
    for key in ("name", "tool_call_id", "weight"):
        if turn.get(key) is not None:
            message[key] = turn[key]
    if message.get("weight", 1) not in (0, 1):
        raise BadRecord(f"field {where}.weight is {turn['weight']!r}, expected 0 (not learned) or 1")
    return message


def _content(turn: Record, where: str) -> str:
    """Text, or OpenAI's list of parts if all are text."""
    parts = turn.get("content")
    if not isinstance(parts, list | tuple):
        return text_field(turn, "content", where)
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise BadRecord(f"field {where}.content[{i}] is not text; only text can be learned")
    return "".join(text_field(part, "text", f"{where}.content[{i}]") for i, part in enumerate(parts))


def _openai_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise BadRecord(f"field {where} has no function object")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI sends JSON text, transformers' templates expect the object
        arguments = parse_json(arguments or "{}", f"{where}.function.arguments")
    result = {
        "type": "function",
        "function": {"name": text_field(function, "name", where), "arguments": arguments},
    }
    return result | ({"id": call["id"]} if call.get("id") is not None else {})


def _calls_of(value: str, where: str) -> list[dict[str, Any]]:
    """ShareGPT's function_call: JSON text of one call {name, arguments}, or of a list of them."""
    calls = parse_json(value, f"{where}.value")
    return [_openai_call({"function": call}, where) for call in (calls if isinstance(calls, list) else [calls])]
