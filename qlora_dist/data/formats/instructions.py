"""Formats with one question and one answer, continued pretraining, and token ids from elsewhere.

Each function takes a record and returns its documents; most return one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import shortened
from .fields import (
    BadRecord,
    Conversation,
    Record,
    Text,
    Tokens,
    list_field,
    object_in,
    optional_text,
    text_field,
    type_name,
)
from .turns import as_context, conversation, openai_messages, prompt_and_answer


def alpaca(record: Record) -> Conversation:
    """instruction, input (may be empty or missing), output."""
    return prompt_and_answer(
        record, text_field(record, "instruction"), optional_text(record, "input"), text_field(record, "output")
    )


def dolly(record: Record) -> Conversation:
    """instruction, context (may be empty or missing), response."""
    return prompt_and_answer(
        record, text_field(record, "instruction"), optional_text(record, "context"), text_field(record, "response")
    )


def input_output(record: Record) -> Conversation:
    """input, output: joined as they are; the template decides what separates them."""
    return prompt_and_answer(record, text_field(record, "input"), "", text_field(record, "output"))


def longform(record: Record) -> Conversation:
    """input, output, and the columns source and subset, which are unused."""
    return input_output(record)


def prompt_completion(record: Record) -> Conversation:
    """prompt, completion: two texts, or two lists of messages. Answers inside the prompt are not learned."""
    if isinstance(record.get("prompt"), list):
        prompt = as_context(openai_messages(record, "prompt"))
        return conversation(record, prompt + openai_messages(record, "completion"))
    return prompt_and_answer(record, text_field(record, "prompt"), "", text_field(record, "completion"))


def self_instruct(record: Record) -> Conversation | list[Conversation]:
    """Seed tasks (instruction, instances of input and output), or the hub's form (prompt and completion).

    The hub's completions end with a literal <|endoftext|>, which is not part of the answer.
    """
    if "instances" not in record:
        completion = text_field(record, "completion").removesuffix("<|endoftext|>")
        return prompt_and_answer(record, text_field(record, "prompt"), "", completion)
    instruction = text_field(record, "instruction")
    return [
        prompt_and_answer(record, instruction, optional_text(one, "input"), text_field(one, "output", where))
        for one, where in _objects(record, "instances")
    ]


def unnatural_instructions(record: Record) -> list[Conversation]:
    """instances, and optionally reformulations: instruction_with_input and output."""
    pairs = _objects(record, "instances")
    if record.get("reformulations"):
        pairs += _objects(record, "reformulations")
    return [
        prompt_and_answer(
            record, text_field(one, "instruction_with_input", where), "", text_field(one, "output", where)
        )
        for one, where in pairs
    ]


def text(record: Record) -> Text:
    """text: one document for continued pretraining; every token is learned."""
    value = text_field(record, "text")
    if not value.strip():
        raise BadRecord("field text is empty")
    return Text(value)


# Names of 0/1 lists that say which tokens are learned; several count together
_TOKEN_MASKS = (
    "loss_mask", "labels_mask", "label_mask", "assistant_masks", "assistant_mask", "completion_mask", "loss_weights",
)  # fmt: skip


def pretokenized(record: Record) -> Tokens:
    """input_ids, and optionally labels (-100 = not learned, else the token itself) and masks (1 = learned)."""
    input_ids = _integers(record, "input_ids")
    if min(input_ids) < 0:
        raise BadRecord(f"field input_ids contains {shortened(min(input_ids))}, which is not a token id")
    is_label = [True] * len(input_ids)
    if record.get("labels") is not None:
        labels = _integers(record, "labels", len(input_ids))
        for i, (token, label) in enumerate(zip(input_ids, labels)):
            if label not in (-100, token):
                raise BadRecord(
                    f"field labels[{i}] is {shortened(label)}, expected -100 or the token {token} itself; labels must "
                    "not be shifted"
                )
        is_label = [label != -100 for label in labels]
    for field in _TOKEN_MASKS:
        if record.get(field) is not None:
            mask = _mask(record, field, len(input_ids))
            is_label = [both and bool(one) for both, one in zip(is_label, mask)]
    if record.get("attention_mask") is not None:
        attended = [bool(one) for one in _mask(record, "attention_mask", len(input_ids))]
        if sorted(attended, reverse=True) != attended:
            raise BadRecord("field attention_mask has a 0 before a 1: remove the padding from input_ids")
        is_label = [label and seen for label, seen in zip(is_label, attended)]
    return Tokens(input_ids, is_label)


def _mask(record: Record, field: str, length: int) -> Sequence[Any]:
    values = list_field(record, field)
    if len(values) != length:
        raise BadRecord(f"field {field} has {len(values)} entries, but input_ids has {length}")
    for i, value in enumerate(values):
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRecord(f"field {field}[{i}] is {shortened(value)}, expected 0 (not learned) or 1")
    return values


def _integers(record: Record, field: str, length: int | None = None) -> list[int]:
    values = list_field(record, field)
    if length is not None and len(values) != length:
        raise BadRecord(f"field {field} has {len(values)} entries, but input_ids has {length}")
    for i, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadRecord(f"field {field}[{i}] is {type_name(value)}, expected a whole number")
    return list(values)


def _objects(record: Record, field: str) -> list[tuple[Record, str]]:
    return [
        (object_in(record, value, f"{field}[{i}]"), f"{field}[{i}]")
        for i, value in enumerate(list_field(record, field))
    ]
