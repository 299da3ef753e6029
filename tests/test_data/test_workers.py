"""What worker processes give back is, record by record and field by field, what this process would have given."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_tokenizers import byte_level_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_dist.data.documents.encode import Encoded, Encoder
from qlora_dist.data.documents.workers import EncodedRecord, encode_records
from qlora_dist.data.formats import RawRecord
from qlora_dist.data.templates import template

# writes a last answer in another way than an earlier one: each gets a document of its own
UNROLLS = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' and loop.last %}{{ '<think/>' }}"
    "{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a process of its own, of which each worker would start one: seconds of imports, and tested elsewhere."""

    def render(source: str, messages: Any, tools: Any, variables: Any) -> str:
        texts, _ = render_jinja_template(conversations=[messages], tools=tools, chat_template=source, **variables)
        return str(texts[0])

    monkeypatch.setattr(template, "render_limited", render)


def _chat(*contents: str, **extra: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **extra}


RECORDS = {
    "messages": [
        _chat("q", "a", "q", "b"),
        _chat("once decoded wrongly: \ufffd", "a", lang="en"),
        {"messages": 5},
        _chat("q", ""),
        _chat("what is <|im_end|>?", "a token", id=1),
    ],
    "text": [{"text": "one"}, {"text": "two \ufffd", "url": "u"}, {"text": " "}],
}


def _plain(record: EncodedRecord) -> dict[str, Any]:
    """For a comparison of every field, whatever its type."""
    assert all(one.input_ids.dtype == np.int32 and one.is_label.dtype == np.bool_ for one in record.documents)
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(record).items()} | {
        "documents": [
            {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(one).items()}
            for one in record.documents
        ]
    }


@pytest.mark.parametrize("format_name", RECORDS)
@pytest.mark.parametrize("num_workers", [3])
def test_workers_give_every_field_of_every_record_in_order(tmp_path: Path, format_name: str, num_workers: int) -> None:
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = UNROLLS
    raws = [RawRecord(fields, f"x, line {i}") for i, fields in enumerate(RECORDS[format_name])]

    def encoded(workers: int) -> list[dict[str, Any]]:
        encoder = Encoder(tokenizer, format_name=format_name, columns={}, template="auto", learn="assistant")
        return [_plain(one) for one in encode_records(encoder, iter(raws), workers, tmp_path, stop_at_bad=False)]

    alone = encoded(1)
    assert encoded(num_workers) == alone and len(alone) == len(raws)
    assert not list(tmp_path.iterdir())  # nothing is left


def test_the_records_above_have_every_flag() -> None:
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = UNROLLS
    seen = set()
    for format_name, records in RECORDS.items():
        encoder = Encoder(tokenizer, format_name=format_name, columns={}, template="auto", learn="assistant")
        raws = [RawRecord(fields, "x") for fields in records]
        for record in encode_records(encoder, iter(raws), 1, Path("unused"), stop_at_bad=False):
            seen |= {name for one in record.documents for name, value in vars(one).items() if np.any(value)}
            seen |= {name for name, value in vars(record).items() if value}
    fields = {field.name for kind in (Encoded, EncodedRecord) for field in dataclasses.fields(kind)}
    assert seen == fields
