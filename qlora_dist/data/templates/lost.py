"""Does the rendered text hold everything that the conversation says? Templates leave out what they do not know."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import UserError, shortened


class BadRecord(UserError):
    """A record that cannot be used. Gives the reason without file and row, which the caller knows."""


class Lost(BadRecord):
    """The template leaves out a part of the conversation. `message`: which one, -1 for a tool."""

    message = -1


def check_nothing_lost(
    name: str,
    text: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    learned: Mapping[int, tuple[int, int]],
) -> None:
    """Raises Lost when something in `messages` or `tools` does not occur in `text`, in order.

    `learned`: message -> the characters (begin, end) that are labels; its text must end inside them. The reasoning of
    any other answer is context that templates rightly leave out. `name` is the template's, for the error.
    Whitespace around a text may be trimmed, and a text may be written as JSON.
    """
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and _find(text, str(function.get("name", "")), 0, len(text)) is None:
            raise _lost(name, f"the tool {shortened(function.get('name'))}")
    position = 0
    for i, message in enumerate(messages):
        # some templates move the system prompt to another turn
        is_system = message["role"] == "system"
        start, end = (0 if is_system else position), learned.get(i, (0, len(text)))[1]
        taken: list[tuple[int, int]] = []
        # the longest first: a short one may also occur inside it
        pieces = sorted(_pieces(message, whole=i in learned), key=lambda named: -len(named[1]))
        for what, piece in pieces:
            # an answer may begin in its prompt (<think>), but must not be all there
            first = max(start, learned[i][0] - len(piece) + 1) if i in learned else start
            found = _find(text, piece, first, end, taken)
            if found is None:
                lost = _lost(name, f"{what} of message {i + 1} ({message['role']}), {shortened(piece)}", what)
                lost.message = i
                raise lost
            taken.append(found)
        if not is_system:
            position = max((stop for _, stop in taken), default=position)


def _lost(name: str, found: str, what: str = "") -> Lost:
    remedy = "data.template=chatml writes every message as it is"
    if what == "reasoning":
        remedy = (
            "use a template that writes it, or put it into the message's content between <think> and </think>, with "
            "data.template=chatml"
        )
    return Lost(f"chat template {name} leaves out {found}, which would be lost without a word: {remedy}")


def _pieces(message: Mapping[str, Any], *, whole: bool) -> Iterator[tuple[str, str]]:
    """What must occur in the text, with its name."""
    is_answer = message["role"] == "assistant"
    content = str(message.get("content") or "")
    if is_answer and not whole:
        content = content.rpartition("</think>")[2]
    if "input" in message:  # Alpaca's prompt has its own place for each
        yield from _named("the text", [str(message.get(key) or "") for key in ("instruction", "input")])
    else:
        # templates write the tags with line breaks of their own
        yield from _named("the text", re.split(r"</?think>", content) if is_answer else [content])
    if whole and is_answer:
        yield from _named("reasoning", [str(message.get("reasoning_content") or "")])
    for call in message.get("tool_calls") or ():
        arguments = call["function"].get("arguments")
        yield from _named("a tool call", [str(call["function"]["name"])])
        if isinstance(arguments, Mapping):
            yield from _named("an argument", [str(key) for key in arguments])


def _named(what: str, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((what, text.strip()) for text in texts if text.strip())


def _find(text: str, piece: str, start: int, end: int, taken: Sequence[tuple[int, int]] = ()) -> tuple[int, int] | None:
    """The first place of `piece` in text[start:end], itself or as JSON, that no other piece has taken."""
    for form in dict.fromkeys((piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1])):
        at = text.find(form, start, end)
        while at >= 0:
            overlapping = [stop for begin, stop in taken if begin < at + len(form) and at < stop]
            if not overlapping:
                return at, at + len(form)
            at = text.find(form, max(overlapping), end)
    return None
