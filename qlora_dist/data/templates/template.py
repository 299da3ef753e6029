"""A chat template: where it comes from, and how a conversation is written with it.

Rendering always goes through transformers' sandbox: a template may come from a model repository. Such a template runs
in a process with limits on time and memory as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import UserError, shortened
from .clock import reads_clock, today, with_clock
from .limited import LimitExceeded, Rejected, render_limited
from .lost import BadRecord
from .named import NAMED

# private-use characters that mark the beginning and end of a learned span during rendering
BEGIN, END = "\ue0f0", "\ue0f1"

_MAX_SOURCE = 2**20  # characters

_MARKERS = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Template:
    """A Jinja source and its name in messages. `is_own`: it comes from the tokenizer or the user's file.

    `tool_source`: the source for conversations with tools, where it is another one. `date` (YYYY-MM-DD): what a
    template that asks for the date is told; null: today.
    """

    name: str
    source: str
    is_own: bool = False
    tool_source: str | None = None
    date: str | None = None

    def for_tools(self, tools: Any) -> Template:
        """The template of a conversation with these tools."""
        return self._with_tools if tools and self.tool_source else self

    @cached_property
    def _with_tools(self) -> Template:
        return Template(f"{self.name} (tool_use)", self.tool_source or self.source, self.is_own, None, self.date)

    @cached_property
    def reads_clock(self) -> bool:
        return reads_clock(self.source + (self.tool_source or ""))

    @cached_property
    def has_markers(self) -> bool:
        return _MARKERS.search(self.source) is not None

    @cached_property
    def rendered_source(self) -> str:
        """What is rendered: the source with its clock stopped."""
        return with_clock(self.source, self.date or today())

    @cached_property
    def source_with_sentinels(self) -> str:
        return with_sentinels(self.rendered_source)

    @cached_property
    def supports_tool_results(self) -> bool:
        return re.search(r"['\"]tool['\"]", self.source) is not None


def resolve_template(tokenizer: Any, name: str, *, default: str, date: str | None = None) -> Template:
    """`auto` (the tokenizer's own, else `default`), `tokenizer`, a named one, or a .jinja file.

    `date` (YYYY-MM-DD): for templates that write the date; None is today.
    """
    if name in ("auto", "tokenizer"):
        source = tokenizer_template(tokenizer)
        if source is not None:
            _check_size("the tokenizer's own", json.dumps(tokenizer.chat_template))
            several = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
            return Template("the tokenizer's own", source, True, several.get("tool_use"), date)
        if name == "tokenizer":
            raise UserError(
                f"data.template is tokenizer, but this tokenizer has no chat template; set it to one of {names()}"
            )
        name = default
    if name.endswith(".jinja"):
        try:
            path = Path(name).expanduser()
            if path.exists() and not path.is_file():
                raise ValueError("it is no file")
            with path.open(encoding="utf-8") as file:
                source = file.read(_MAX_SOURCE + 1)
            _check_size(name, source)
            return Template(name, source, is_own=True, date=date)
        except (OSError, ValueError) as error:
            raise UserError(f"data.template {name}: cannot be read ({error})") from None
    if name not in NAMED:
        raise UserError(f"data.template is {name!r}; expected auto, tokenizer, a .jinja file or one of {names()}")
    if "eos_token" in NAMED[name] and tokenizer.eos_token is None:
        raise UserError(f"template {name} ends answers with the EOS token, but this tokenizer has none")
    return Template(name, NAMED[name].replace("@BOS@", "bos_token" if adds_bos(tokenizer) else "''"))


def _check_size(name: str, source: str) -> None:
    if len(source) > _MAX_SOURCE:
        raise UserError(
            f"chat template {name} has more than {_MAX_SOURCE:,} characters, expected a few thousand; set "
            f"data.template to one of {names()}"
        )


def tokenizer_template(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template; of several, the one named default. Raises UserError when none is."""
    template = tokenizer.chat_template
    if isinstance(template, dict) and template and "default" not in template:
        raise UserError(
            f"this tokenizer has several chat templates ({', '.join(sorted(template))}), but none named default; write "
            "the one to use into a .jinja file and name it in data.template"
        )
    return template.get("default") if isinstance(template, dict) else template


def template_key(tokenizer: Any, name: str, date: str | None) -> list[Any]:
    """What identifies the template of `data.template` in a fingerprint: its source, and the date if it asks for it."""
    own: Any = None
    path = Path(name).expanduser()
    if name.endswith(".jinja") and path.is_file():
        name, own = ".jinja", path.read_bytes().decode("utf-8", "replace")  # wherever it lies
    elif name in ("auto", "tokenizer"):
        own = tokenizer.chat_template
    is_dated = reads_clock(json.dumps(own))
    return [name, own, NAMED.get(name, sorted(NAMED.items())), (date or today()) if is_dated else None]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer prepends BOS to plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def names() -> str:
    return ", ".join(NAMED)


def apply_template(
    tokenizer: Any,
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    tools: Any = None,
    *,
    source: str | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation. Raises BadRecord when the template rejects it. `source`: another form of its own."""
    template = template.for_tools(tools)
    source = source or template.rendered_source
    turns = [_as_read(message) for message in messages]
    if template.is_own:
        variables = {**tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        try:
            return render_limited(source, turns, tools, variables)
        except LimitExceeded as limit:
            raise UserError(
                f"chat template {template.name} is stopped: it took {limit} for one conversation, where others take "
                f"milliseconds. It is broken or meant to harm; set data.template to one of {names()}"
            ) from None
        except Rejected as error:  # a template may raise anything: jinja2 errors, TypeError for a missing field
            raise BadRecord(f"the chat template rejects this conversation: {shortened(str(error))}") from None
    text: str = tokenizer.apply_chat_template(
        turns, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text


def _as_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without nulls, whose reasoning has both names that templates read it by (gpt-oss: thinking)."""
    given = {key: value for key, value in message.items() if value is not None}
    return {"thinking": given["reasoning_content"], **given} if "reasoning_content" in given else given


def with_sentinels(source: str) -> str:
    """The template with a sentinel at each marker. Whitespace control (`-`, trim_blocks) works as before."""
    source = re.sub(
        r"\{%([-+]?)\s*generation\s*([-+]?)%\}",
        rf"{{%\1 generation %}}{{% if true %}}{BEGIN}{{% endif \2%}}",
        source,
    )
    return re.sub(
        r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}",
        rf"{{%\1 if true %}}{END}{{% endif %}}{{% endgeneration \2%}}",
        source,
    )
