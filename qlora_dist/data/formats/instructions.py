"""Formats with one question and one answer, continued pretraining, and token ids from elsewhere.

Each function takes a record and returns its documents; most return one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .chats import openai_messages
from .fields import (
    BadRecord,
    Conversation,
    Record,
    Text,
    Tokens,
    check_roles,
    list_field,
    optional_text,
    prompt_and_answer,
    text_field,
    type_name,
)


def alpaca(record: Record) -> Conversation:
    """instruction, input (may be empty or missing), output; optionally system."""
    return prompt_and_answer(
        text_field(record, "instruction"),
        optional_text(record, "input"),
        text_field(record, "output"),
        optional_text(record, "system"),
    )


def dolly(record: Record) -> Conversation:
    """instruction, context (may be empty or missing), response."""
    return prompt_and_answer(
        text_field(record, "instruction"), optional_text(record, "context"), text_field(record, "response")
    )


def input_output(record: Record) -> Conversation:
    """input, output: joined as they are; the template decides what separates them."""
    return prompt_and_answer(text_field(record, "input"), "", text_field(record, "output"))


def longform(record: Record) -> Conversation:
    """input, output, and the columns source and subset, which are unused."""
    return input_output(record)


def prompt_completion(record: Record) -> Conversation:
    """prompt, completion: two texts, or two lists of messages."""
    if isinstance(record.get("prompt"), list):
        prompt = openai_messages(list_field(record, "prompt"), "prompt")
        completion = openai_messages(list_field(record, "completion"), "completion")
        return Conversation(check_roles(prompt + completion))
    return prompt_and_answer(text_field(record, "prompt"), "", text_field(record, "completion"))


def self_instruct(record: Record) -> Conversation | list[Conversation]:
    """Seed tasks (instruction, instances of input and output), or the hub's form (prompt and completion).

    The hub's completions end with a literal <|endoftext|>, which is not part of the answer.
    """
    if "instances" not in record:
        completion = text_field(record, "completion").removesuffix("<|endoftext|>")
        return prompt_and_answer(text_field(record, "prompt"), "", completion)
    instruction = text_field(record, "instruction")
    return [
        prompt_and_answer(instruction, optional_text(one, "input"), text_field(one, "output", where))
        for one, where in _objects(record, "instances")
    ]


def unnatural_instructions(record: Record) -> list[Conversation]:
    """instances, and optionally reformulations: instruction_with_input and output."""
    pairs = _objects(record, "instances")
    if record.get("reformulations"):
        pairs += _objects(record, "reformulations")
    return [
        prompt_and_answer(text_field(one, "instruction_with_input", where), "", text_field(one, "output", where))
        for one, where in pairs
    ]


def text(record: Record) -> Text:
    """text: one document for continued pretraining; every token is learned."""
    value = text_field(record, "text")
    if not value.strip():
        raise BadRecord("field text is empty")
    return Text(value)


def pretokenized(record: Record) -> Tokens:
    """input_ids, and optionally labels (-100 = not learned, else the token itself)."""
    input_ids = _integers(record, "input_ids")
    if min(input_ids) < 0:
        raise BadRecord(f"field input_ids contains {min(input_ids)}, which is not a token id")
    if record.get("labels") is None:
        return Tokens(input_ids, [True] * len(input_ids))
    labels = _integers(record, "labels")
    if len(labels) != len(input_ids):
        raise BadRecord(f"field labels has {len(labels)} entries, but input_ids has {len(input_ids)}")
    for i, (token, label) in enumerate(zip(input_ids, labels)):
        if label not in (-100, token):
            raise BadRecord(
                f"field labels[{i}] is {label}, expected -100 or the token {token} itself; labels must not be shifted"
            )
    return Tokens(input_ids, [label != -100 for label in labels])


def _integers(record: Record, field: str) -> list[int]:
    values = list_field(record, field)
    for i, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadRecord(f"field {field}[{i}] is {type_name(value)}, expected a whole number")
    return list(values)


def _objects(record: Record, field: str) -> list[tuple[Mapping[str, Any], str]]:
    objects = []
    for i, value in enumerate(list_field(record, field)):
        where = f"{field}[{i}]"
        if not isinstance(value, Mapping):
            raise BadRecord(f"field {where} is {type_name(value)}, expected an object")
        objects.append((value, where))
    return objects
