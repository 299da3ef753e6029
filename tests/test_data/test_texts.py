"""A text that comes in parts is encoded as one: it begins once and ends once."""

from __future__ import annotations

import pytest
from helpers.tiny_tokenizers import TOKENIZERS, byte_level_tokenizer, sentencepiece_tokenizer

from qlora_dist.data.documents.encode import Encoded, Encoder
from qlora_dist.data.formats import BadRecord, RawRecord


def _encode(tokenizer: object, texts: list[tuple[str, bool, bool]]) -> list[Encoded]:
    """(text, is first, is last) -> one document each."""
    encoder = Encoder(tokenizer, format_name="text", columns={}, template="auto", learn="assistant")
    records = [RawRecord({"text": text}, "x.txt", is_first=first, is_last=last) for text, first, last in texts]
    results = encoder.encode(records)
    assert not any(isinstance(result, BadRecord) for result in results)
    return [one for result in results for one in result]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_only_the_first_part_begins_a_text_and_only_the_last_ends_it(kind: str, num_parts: int) -> None:
    tokenizer = TOKENIZERS[kind]()
    last = num_parts - 1
    parts = _encode(tokenizer, [(f"Hello there {i}", i == 0, i == last) for i in range(num_parts)])
    assert len(parts) == num_parts
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for i, part in enumerate(parts):
        ids = part.input_ids.tolist()
        assert (ids[0] == bos) == (i == 0 and kind == "sentencepiece")
        assert (ids[-1] == eos) == (i == last) and eos not in ids[1:-1] and bos not in ids[1:-1]
        assert part.is_text and part.is_label.tolist() == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize(("text", "tokenizer"), [("<s>Hi</s>", sentencepiece_tokenizer), ("Hi<|endoftext|>", None)])
def test_a_beginning_or_end_that_a_text_spells_out_is_not_written_twice(text: str, tokenizer: object) -> None:
    chosen = (tokenizer or byte_level_tokenizer)()  # type: ignore[operator]
    (whole,) = _encode(chosen, [(text, True, True)])
    ids = whole.input_ids.tolist()
    assert ids.count(chosen.eos_token_id) == 1 == ids[::-1].index(chosen.eos_token_id) + 1
    assert ids.count(chosen.bos_token_id) == 1
