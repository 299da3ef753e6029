"""Multi-turn formats: OpenAI messages, ShareGPT, OASST trees, hh-rlhf, Guanaco and chip2 texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import shortened
from .fields import BadRecord, Conversation, Message, Record, list_field, object_in, parse_json, text_field, type_name
from .turns import conversation, openai_call, openai_messages, settings_of_turn


def messages(record: Record) -> Conversation:
    """OpenAI chat: messages with role and content, tools, tool_calls and tool results."""
    return conversation(record, openai_messages(record, "messages"))


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
    """conversations with from (human, gpt, system, function_call, observation) and value; tools, system.

    The format has no place for the ids of calls, which some templates need: nine characters are made for each.
    """
    result: list[Message] = []
    waiting: list[str] = []  # ids of calls without a result
    num_calls = 0
    for i, value in enumerate(list_field(record, "conversations")):
        where = f"conversations[{i}]"
        turn = object_in(record, value, where, "an object with from and value")
        sender = text_field(turn, "from", where)
        if sender not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise BadRecord(f"field {where}.from is {shortened(sender)}, expected one of {known}")
        message: Message = {"role": SHAREGPT_ROLES[sender], "content": text_field(turn, "value", where)}
        if sender == "function_call":
            calls = _calls_of(message["content"], where)
            waiting = [f"call{num_calls + n:05}" for n in range(len(calls))]
            num_calls += len(calls)
            message |= {"content": "", "tool_calls": [call | {"id": id_} for call, id_ in zip(calls, waiting)]}
        elif message["role"] == "tool" and waiting:
            message["tool_call_id"] = waiting.pop(0)
        result.append(message | settings_of_turn(turn, message["role"], where))
    return conversation(record, result)


def hh_rlhf(record: Record) -> Conversation:
    """chosen: text like '\\n\\nHuman: ...\\n\\nAssistant: ...', or a list of messages. rejected is unused."""
    if isinstance(record.get("chosen"), list):
        return conversation(record, openai_messages(record, "chosen"))
    return _split_turns(record, "chosen", _HH_TURN)


def guanaco(record: Record) -> Conversation:
    """text like '### Human: ...### Assistant: ...' (openassistant-guanaco)."""
    return _split_turns(record, "text", _GUANACO_TURN)


def chip2(record: Record) -> Conversation:
    """text like '<human>: ...\\n<bot>: ...' (OIG's unified_chip2)."""
    return _split_turns(record, "text", _CHIP2_TURN)


def oasst(record: Record) -> Conversation:
    """A tree of messages with replies: the path of best-ranked replies, up to the last answer on it."""
    node: Any = record.get("prompt", record)
    path: list[Message] = []
    while True:
        message = node if node is record else object_in(record, node, "replies[]", "a message object")
        for used in _OASST_USED:
            message.get(used)
        role = text_field(message, "role")
        if role not in _OASST_ROLES:
            raise BadRecord(f"a message has role {shortened(role)}, expected prompter or assistant")
        path.append({"role": _OASST_ROLES[role], "content": text_field(message, "text")})
        replies = message.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
            raise BadRecord(f"field replies of a message is {type_name(replies)}, expected a list of message objects")
        replies = [reply for reply in replies if not reply.get("deleted")]
        if not replies:
            break
        node = min(replies, key=_rank)
    if path[-1]["role"] == "user":
        path.pop()
    return conversation(record, path)


def _rank(reply: Mapping[str, Any]) -> float:
    """0 is the best; without ranks, the first reply is used."""
    rank = reply.get("rank")
    if rank is not None and (not isinstance(rank, int | float) or isinstance(rank, bool)):
        raise BadRecord(f"field rank of a reply is {type_name(rank)}, expected a number")
    return float("inf") if rank is None else rank


_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_OASST_USED = ("message_id", "parent_id", "rank", "deleted")  # to build the tree and choose the path
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_GUANACO_TURN = re.compile(r"(?:^|\s*)### (Human|Assistant):")
_CHIP2_TURN = re.compile(r"(?:^|\n)<(human|bot)>:")


def _split_turns(record: Record, field: str, pattern: re.Pattern[str]) -> Conversation:
    value = text_field(record, field)
    before, *pieces = pattern.split(value)
    if before.strip() or not pieces:
        raise BadRecord(f"field {field} starts with {value[:30]!r}, expected a turn that matches {pattern.pattern}")
    turns: list[Message] = []
    for speaker, content in zip(pieces[::2], pieces[1::2]):
        role = "user" if speaker.lower() == "human" else "assistant"
        turns.append({"role": role, "content": content.strip()})
    return conversation(record, turns)


def _calls_of(value: str, where: str) -> list[dict[str, Any]]:
    """ShareGPT's function_call: JSON text of one call {name, arguments}, or of a list of them."""
    calls = parse_json(value, f"{where}.value")
    return [openai_call({"function": call}, where) for call in (calls if isinstance(calls, list) else [calls])]
