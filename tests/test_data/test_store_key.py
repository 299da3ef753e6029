"""Tokenized data are found again only where everything that decides their tokens is the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

from qlora_dist.config import SourceConfig
from qlora_dist.data.documents import build_documents
from qlora_dist.data.templates import NAMED

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}", "answer": f"b{i}"} for i in range(4)]


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return SourceConfig(path=str(path))


def built(tmp_path: Path, source: SourceConfig, tokenizer: Any = None, **options: Any) -> Any:
    settings = {"row_tokens": 512, "cache_dir": tmp_path / "cache", **options}
    return build_documents([source], tokenizer or byte_level_tokenizer(), **settings)


def folder(*arguments: Any, **options: Any) -> str:
    return str(built(*arguments, **options)._store.folder.name)


def test_each_setting_that_decides_tokens_makes_another_store(tmp_path: Path, source: SourceConfig) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"row_tokens": 256}, {"on_long": "drop"}, {"on_bad": "skip"}, {"learn": "all"}, {"template": "chatml"},
        {"tokenizer": sentencepiece_tokenizer()},
    ]  # fmt: skip
    assert len({folder(tmp_path, source, **change) for change in changes}) == len(changes)


@pytest.mark.parametrize("name", [*NAMED, "auto"])
def test_another_text_of_a_named_template_makes_another_store(
    tmp_path: Path, source: SourceConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = folder(tmp_path, source, template=name)
    used = "none" if name == "auto" else name  # of prompts and completions
    monkeypatch.setitem(NAMED, used, NAMED[used] + "{{- ' ' -}}")
    assert folder(tmp_path, source, template=name) != before


def test_another_role_of_a_token_makes_another_store(tmp_path: Path, source: SourceConfig) -> None:
    """A tokenizer's own file says nothing of roles: which token ends an answer is beside it."""
    other = copy.deepcopy(byte_level_tokenizer())
    other.eos_token = "<|im_end|>"
    assert other.backend_tokenizer.to_str() == byte_level_tokenizer().backend_tokenizer.to_str()
    first, second = (built(tmp_path, source, tokenizer) for tokenizer in (None, other))
    assert first[0].input_ids[-1] == byte_level_tokenizer().eos_token_id
    assert second[0].input_ids[-1] == other.eos_token_id != first[0].input_ids[-1]


def test_another_vocabulary_with_the_same_roles_makes_another_store(tmp_path: Path, source: SourceConfig) -> None:
    other = copy.deepcopy(byte_level_tokenizer())
    other.add_tokens(["q1"])
    assert other.special_tokens_map == byte_level_tokenizer().special_tokens_map
    first, second = (built(tmp_path, source, tokenizer) for tokenizer in (None, other))
    assert first[1].input_ids.tolist() != second[1].input_ids.tolist()
    assert len(second[1]) < len(first[1])  # its token of two characters is used


def test_each_way_to_read_a_source_makes_another_store(tmp_path: Path, source: SourceConfig) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"format": "prompt-completion"}, {"columns": {"completion": "answer"}}, {"max_examples": 2},
        {"split": "train[:50%]"},
    ]  # fmt: skip
    assert len({folder(tmp_path, source.model_copy(update=change)) for change in changes}) == len(changes)


def test_what_chooses_among_documents_and_where_the_file_lies_does_not(tmp_path: Path, source: SourceConfig) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.jsonl").write_bytes(Path(source.path).read_bytes())
    changes: list[dict[str, Any]] = [
        {}, {"weight": 2.0}, {"hold_out": 0.5, "part": "train"}, {"hold_out": 2, "part": "held_out"}, {"name": "n"},
        {"max_examples": 2, "shuffle": True}, {"path": str(elsewhere / "b.jsonl")},
    ]  # fmt: skip
    assert len({folder(tmp_path, source.model_copy(update=change)) for change in changes}) == 1


def test_the_same_bytes_under_another_suffix_are_other_data(tmp_path: Path) -> None:
    text = '{"text": "one"}\n'
    for suffix in (".jsonl", ".txt"):
        (tmp_path / f"a{suffix}").write_text(text)
    sources = [SourceConfig(path=str(tmp_path / f"a{suffix}"), format="text") for suffix in (".jsonl", ".txt")]
    learned = [byte_level_tokenizer().decode(built(tmp_path, one)[0].input_ids) for one in sources]
    assert learned[0] == "one<|endoftext|>" and '"text"' in learned[1]
