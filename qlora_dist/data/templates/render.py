"""Conversation -> texts with learned spans that are exact to the character.

Spans come from `{% generation %}` markers if the template has them. If it has none, they come from
prefixes: the conversation up to an answer, rendered with the generation prompt, must be a prefix of the whole
text. Where a template writes an earlier answer in another way than at the end (Qwen3 drops its reasoning), no single
text can hold all answers: each gets a text of its own, the conversation up to it. No mask is approximate, and what
the template leaves out of the text is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UserError, shortened
from .control import control_tokens
from .lost import BadRecord, Lost, check_nothing_lost
from .template import BEGIN, END, Template, apply_template, names


class Unplaced(UserError):
    """The answers cannot be placed in the text of this conversation."""


@dataclass(frozen=True)
class Rendered:
    """Text and its learned character spans, in order, not overlapping.

    `from_prefixes`: the spans come from prefixes, which the caller must verify token by token. `is_unrolled`: the text
    ends with one of several answers, each of which has such a text.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    from_prefixes: bool = False
    is_unrolled: bool = False


def render(
    tokenizer: Any, template: Template, messages: Sequence[dict[str, Any]], tools: Any, learn: str
) -> list[Rendered]:
    """Texts and learned spans. learn: assistant (every answer), last (the last answer), all (everything).

    One text, or one per answer where the template writes earlier answers differently. An answer with `weight: 0`
    (OpenAI's fine-tuning format) is context under assistant and last. Raises BadRecord for a conversation that the
    template rejects or does not write whole, UserError for a template whose answers cannot be placed.
    """
    template = template.for_tools(tools)
    _check_supported(template, messages, tools)
    if learn == "all":
        text = apply_template(tokenizer, template, messages, tools)
        everything = {i: (0, len(text)) for i in range(len(messages))}
        check_nothing_lost(template.name, text, messages, tools, everything)
        return [Rendered(text, ((0, len(text)),))]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i in (answers if learn == "assistant" else answers[-1:]) if messages[i].get("weight", 1)]
    place = _place_by_markers if template.has_markers else _place_by_prefixes
    try:
        return [place(tokenizer, template, messages, tools, wanted)]
    except (Lost, Unplaced):
        if not wanted or wanted == [len(messages) - 1]:
            raise
    alone = [place(tokenizer, template, messages[: i + 1], tools, [i]) for i in wanted]
    return [replace(rendered, is_unrolled=len(alone) > 1) for rendered in alone]


def _check_supported(template: Template, messages: Sequence[dict[str, Any]], tools: Any) -> None:
    """Rejects what the template would silently omit."""
    omitted = []
    if tools and "tools" not in template.source:
        omitted.append("tools")
    if "tool_calls" not in template.source and any(message.get("tool_calls") for message in messages):
        omitted.append("tool calls")
    if not template.supports_tool_results and any(message["role"] == "tool" for message in messages):
        omitted.append("tool results")
    if omitted:
        raise BadRecord(f"template {template.name} does not support {' or '.join(omitted)}; data.template=chatml does")


# --- by markers -------------------------------------------------------------------------------------------------------


def _place_by_markers(
    tokenizer: Any, template: Template, messages: Sequence[Any], tools: Any, wanted: Sequence[int]
) -> Rendered:
    text, marked = _marked_spans(tokenizer, template, messages, tools)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marked) != len(answers):
        raise UserError(
            f"chat template {template.name}: its generation markers enclose {len(marked)} spans for "
            f"{len(answers)} answers, so the learned spans are ambiguous; set data.template to one of {names()}"
        )
    spans = {i: marked[answers.index(i)] for i in wanted}
    check_nothing_lost(template.name, text, messages, tools, {i: (0, len(text)) for i in wanted})
    try:
        check_nothing_lost(template.name, text, messages, tools, spans)
    except Lost as lost:
        raise UserError(
            f"chat template {template.name}: its generation markers do not enclose the answer "
            f"{shortened(messages[lost.message]['content'])}; set data.template to one of {names()}"
        ) from None
    return Rendered(text, tuple(spans.values()))


def _marked_spans(
    tokenizer: Any, template: Template, messages: Sequence[Any], tools: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the spans between its markers."""
    marked = apply_template(tokenizer, template, messages, tools, source=template.source_with_sentinels)
    text, spans, begin = "", [], -1
    for piece in re.split(f"([{BEGIN}{END}])", marked):
        if piece == BEGIN and begin < 0:
            begin = len(text)
        elif piece == END and begin >= 0:
            spans.append((begin, len(text)))
            begin = -1
        elif piece in (BEGIN, END):
            raise BadRecord("a conversation must not contain the private-use characters U+E0F0 and U+E0F1")
        else:
            text += piece
    if template.is_own and text != apply_template(tokenizer, template, messages, tools):
        raise UserError(
            f"chat template {template.name}: its text depends on its generation markers, so it cannot be masked "
            f"exactly; set data.template to one of {names()}"
        )
    return text, spans


# --- by prefixes ------------------------------------------------------------------------------------------------------


def _place_by_prefixes(
    tokenizer: Any, template: Template, messages: Sequence[Any], tools: Any, wanted: Sequence[int]
) -> Rendered:
    text = apply_template(tokenizer, template, messages, tools)
    check_nothing_lost(template.name, text, messages, tools, {i: (0, len(text)) for i in wanted})
    spans = {}
    for i in wanted:
        before = apply_template(tokenizer, template, messages[:i], tools, add_generation_prompt=True)
        is_last = i == len(messages) - 1
        until = text if is_last else apply_template(tokenizer, template, messages[: i + 1], tools)
        end = _answer_end(tokenizer, text, until)
        if not text.startswith(before) or end is None or end < len(before):
            raise _unplaced(tokenizer, template, messages, tools, i, before, until)
        answer, content = text[len(before) : end], messages[i]["content"].strip()
        # text that the template inserts before an answer is learned only if the generation prompt ends before it
        if not answer.lstrip().startswith(content) and before == apply_template(
            tokenizer, template, messages[:i], tools
        ):
            raise UserError(
                f"chat template {template.name} has no generation prompt: {answer.partition(content)[0][:40]!r} before "
                f"the answer cannot be distinguished from it; set data.template to one of {names()}"
            )
        spans[i] = (len(before), _end_of_turn(tokenizer, text, len(before), end))
    check_nothing_lost(template.name, text, messages, tools, spans)
    return Rendered(text, tuple(spans.values()), from_prefixes=True)


def _answer_end(tokenizer: Any, text: str, until: str) -> int | None:
    """Where an answer ends in `text`; `until` is the conversation up to it. None: `text` writes it differently.

    Some templates (Phi) close the text with one more token, after the end of the last turn: it is not part of an
    answer. A token that stands in place of the end of turn (gpt-oss) is.
    """
    if text.startswith(until):
        return len(until)
    control = control_tokens(tokenizer)
    shared = _num_shared(text, until)
    for end in range(shared, max(0, shared - control.longest), -1):  # the two tokens that differ may begin alike
        if control.start_of(until[end : end + control.longest]):
            is_ended = control.end_of(until[:end].rstrip())
            return end if is_ended and text.endswith(until[end:]) else None
    return None


def _unplaced(
    tokenizer: Any, template: Template, messages: Sequence[Any], tools: Any, i: int, before: str, until: str
) -> Unplaced:
    """Why the answer in message i does not follow its prompt."""
    shared = _num_shared(before, until)
    if shared == len(before):
        return Unplaced(
            f"chat template {template.name} renders message {i + 1} of {len(messages)} differently when more messages "
            f"follow, so labels cannot be placed exactly; set data.template to one of {names()}"
        )
    context = apply_template(tokenizer, template, messages[:i], tools)
    if shared >= _num_shared(context, before):
        return Unplaced(
            f"chat template {template.name}: its generation prompt ends in {before[shared:][:40]!r}, where it writes "
            f"{until[shared:][:40]!r} in message {i + 1} of {len(messages)}, the answer itself. A model trained on the "
            "one would be asked to continue the other; set data.template to a .jinja file whose generation prompt is "
            f"what it writes before an answer, or to one of {names()}"
        )
    return Unplaced(
        f"chat template {template.name} renders the messages before an answer (message {i + 1} of {len(messages)}) "
        f"differently when the answer follows: {before[shared:][:40]!r} becomes {until[shared:][:40]!r}; set "
        f"data.template to one of {names()}"
    )


def _num_shared(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _end_of_turn(tokenizer: Any, text: str, begin: int, end: int) -> int:
    """Excludes whitespace after the end-of-turn token: the model stops at the token and never writes it."""
    stripped = text[begin:end].rstrip()
    return begin + len(stripped) if control_tokens(tokenizer).end_of(stripped) else end
