"""Conversation -> text with learned spans that are exact to the character.

Rendering always goes through the tokenizer's `apply_chat_template`, and so through transformers' sandbox: a
template may come from a model repository.

Spans come from `{% generation %}` markers if the template has them. If it has none, they come from
prefixes: the conversation up to an answer, rendered with the generation prompt, must be a prefix of the whole
text. A template that breaks this (some rewrite earlier turns) is rejected; no mask is approximate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import UserError
from .named import NAMED

# private-use characters that mark the beginning and end of a learned span during rendering
_BEGIN, _END = "\ue0f0", "\ue0f1"

_MARKERS = re.compile(r"\{%[-+]?\s*generation\b")


class BadRecord(UserError):
    """A record that cannot be used. Gives the reason without file and row, which the caller knows."""


@dataclass(frozen=True)
class Rendered:
    """Text and its learned character spans, in order, not overlapping.

    `from_prefixes`: the spans come from prefixes, which the caller must verify token by token.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    from_prefixes: bool = False


@dataclass(frozen=True)
class Template:
    """A Jinja source and its name in messages. `is_own`: it comes from the tokenizer or the user's file."""

    name: str
    source: str
    is_own: bool = False

    @cached_property
    def has_markers(self) -> bool:
        return _MARKERS.search(self.source) is not None

    @cached_property
    def source_with_sentinels(self) -> str:
        return _with_sentinels(self.source)

    @cached_property
    def supports_tool_results(self) -> bool:
        return re.search(r"['\"]tool['\"]", self.source) is not None


def resolve_template(tokenizer: Any, name: str, *, default: str) -> Template:
    """`auto` (the tokenizer's own, else `default`), `tokenizer`, a named one, or a .jinja file."""
    if name in ("auto", "tokenizer"):
        source = tokenizer_template(tokenizer)
        if source is not None:
            return Template("the tokenizer's own", source, is_own=True)
        if name == "tokenizer":
            raise UserError(
                f"data.template is tokenizer, but this tokenizer has no chat template; set it to one of {_names()}"
            )
        name = default
    if name.endswith(".jinja"):
        try:
            return Template(name, Path(name).expanduser().read_text(encoding="utf-8"), is_own=True)
        except OSError as error:
            raise UserError(f"data.template {name}: cannot be read ({error})") from None
    if name not in NAMED:
        raise UserError(f"data.template is {name!r}; expected auto, tokenizer, a .jinja file or one of {_names()}")
    if "eos_token" in NAMED[name] and tokenizer.eos_token is None:
        raise UserError(f"template {name} ends answers with the EOS token, but this tokenizer has none")
    return Template(name, NAMED[name].replace("@BOS@", "bos_token" if adds_bos(tokenizer) else "''"))


def tokenizer_template(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template; of several, the one named default."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer prepends BOS to plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def render(tokenizer: Any, template: Template, messages: Sequence[dict[str, Any]], tools: Any, learn: str) -> Rendered:
    """Text and learned spans. learn: assistant (every answer), last (the last answer), all (everything).

    An answer with `weight: 0` (OpenAI's fine-tuning format) is context under assistant and last.
    """
    _check_supported(template, messages, tools)
    if learn == "all":
        text = _apply(tokenizer, template.source, messages, tools)
        return Rendered(text, ((0, len(text)),))
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i in (answers if learn == "assistant" else answers[-1:]) if messages[i].get("weight", 1)]
    if template.has_markers:
        rendered = _render_with_markers(tokenizer, template, messages, tools)
        if len(rendered.spans) != len(answers):
            raise UserError(
                f"chat template {template.name}: its generation markers enclose {len(rendered.spans)} spans for "
                f"{len(answers)} answers, so the learned spans are ambiguous; set data.template to one of {_names()}"
            )
        spans = [rendered.spans[answers.index(i)] for i in wanted]
        for i, (begin, end) in zip(wanted, spans):
            if messages[i]["content"].strip() not in rendered.text[begin:end]:
                raise UserError(
                    f"chat template {template.name}: its generation markers do not enclose the answer "
                    f"{messages[i]['content'][:40]!r}; set data.template to one of {_names()}"
                )
        return Rendered(rendered.text, tuple(spans))
    return _render_with_prefixes(tokenizer, template, messages, tools, wanted)


def _names() -> str:
    return ", ".join(NAMED)


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


def _apply(tokenizer: Any, source: str, messages: Any, tools: Any, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=source, tokenize=False, **options
        )
    except Exception as error:  # a template may raise anything: jinja2 errors, TypeError for a missing field
        raise BadRecord(f"the chat template rejects this conversation: {error}") from None


def _render_with_markers(tokenizer: Any, template: Template, messages: Any, tools: Any) -> Rendered:
    marked = _apply(tokenizer, template.source_with_sentinels, messages, tools)
    text, spans, begin = "", [], -1
    for piece in re.split(f"([{_BEGIN}{_END}])", marked):
        if piece == _BEGIN and begin < 0:
            begin = len(text)
        elif piece == _END and begin >= 0:
            spans.append((begin, len(text)))
            begin = -1
        elif piece in (_BEGIN, _END):
            raise BadRecord("a conversation must not contain the private-use characters U+E0F0 and U+E0F1")
        else:
            text += piece
    if template.is_own and text != _apply(tokenizer, template.source, messages, tools):
        raise UserError(
            f"chat template {template.name}: its text depends on its generation markers, so it cannot be masked "
            f"exactly; set data.template to one of {_names()}"
        )
    return Rendered(text, tuple(spans))


def _with_sentinels(source: str) -> str:
    """The template with a sentinel at each marker. Whitespace control (`-`, trim_blocks) works as before."""
    source = re.sub(
        r"\{%([-+]?)\s*generation\s*([-+]?)%\}",
        rf"{{%\1 generation %}}{{% if true %}}{_BEGIN}{{% endif \2%}}",
        source,
    )
    return re.sub(
        r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}",
        rf"{{%\1 if true %}}{_END}{{% endif %}}{{% endgeneration \2%}}",
        source,
    )


def _render_with_prefixes(
    tokenizer: Any, template: Template, messages: Any, tools: Any, wanted: Sequence[int]
) -> Rendered:
    text = _apply(tokenizer, template.source, messages, tools)
    spans = []
    for i in wanted:
        before = _apply(tokenizer, template.source, messages[:i], tools, add_generation_prompt=True)
        until = _apply(tokenizer, template.source, messages[: i + 1], tools)
        if not text.startswith(before) or not text.startswith(until):
            raise UserError(
                f"chat template {template.name} renders message {i + 1} of {len(messages)} differently when more "
                f"messages follow, so labels cannot be placed exactly; set data.template to one of {_names()}, or "
                "data.learn to last"
            )
        answer, content = text[len(before) : len(until)], messages[i]["content"].strip()
        is_first = answer.lstrip().startswith(content)
        # text that the template inserts before an answer is learned only if the generation prompt ends before it
        if not is_first and before == _apply(tokenizer, template.source, messages[:i], tools):
            raise UserError(
                f"chat template {template.name} has no generation prompt: {answer.partition(content)[0][:40]!r} before "
                f"the answer cannot be distinguished from it; set data.template to one of {_names()}"
            )
        spans.append((len(before), _end_of_turn(tokenizer, text, len(before), len(until))))
    return Rendered(text, tuple(spans), from_prefixes=True)


def _end_of_turn(tokenizer: Any, text: str, begin: int, end: int) -> int:
    """Excludes whitespace after the end-of-turn token: the model stops at the token and never writes it."""
    shorter = len(text[begin:end].rstrip()) + begin
    if any(text[begin:shorter].endswith(token) for token in tokenizer.all_special_tokens):
        return shorter
    return end
