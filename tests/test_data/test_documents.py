"""Sources become documents once and exactly, and every lost token is counted."""

import json

import numpy as np
import pytest
from helpers.documents import ALPACA, answers, build, texts, write
from helpers.shared_data import shared_file
from helpers.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config import SourceConfig
from qlora_dist.data.documents import build as build_module
from qlora_dist.data.documents import build_documents, split_sources
from qlora_dist.data.packing import pack_best_fit
from qlora_dist.errors import UserError


@pytest.fixture
def alpaca(tmp_path):
    return SourceConfig(path=write(tmp_path / "alpaca.jsonl", ALPACA))


def test_labels_are_the_answers_and_their_end_token(tmp_path, alpaca):
    documents = build(tmp_path, alpaca)
    assert answers(documents) == [row["output"] + "<|endoftext|>" for row in ALPACA]
    assert documents.lengths.tolist() == [len(documents[i]) for i in range(40)]
    assert documents.num_labels.tolist() == [documents[i].num_labels for i in range(40)]
    (stats,) = documents.stats.sources
    assert (stats.records, stats.examples, stats.bad, stats.format) == (40, 40, 0, "alpaca")
    assert stats.tokens == documents.lengths.sum() and stats.labels == documents.num_labels.sum()


@pytest.mark.parametrize("num_workers", [2])
def test_worker_processes_give_the_same_store_as_this_process(tmp_path, num_workers):
    rows = [*ALPACA, {"instruction": "bad"}, *(row | {"id": 1} for row in ALPACA[:7]), ALPACA[0] | {"lang": "en"}]
    source = SourceConfig(path=write(tmp_path / "a.jsonl", rows))
    alone = build(tmp_path, source, cache_dir=tmp_path / "one", on_bad="skip")
    many = build(tmp_path, source, cache_dir=tmp_path / "many", on_bad="skip", num_workers=num_workers)
    assert many.fingerprint == alone.fingerprint and many.stats == alone.stats
    assert many.stats.sources[0].unread == {"id": 7, "lang": 1}
    assert many.stats.sources[0].unread_text() == "id (7), lang (1)"
    for name in ("input_ids.bin", "is_label.bin", "record_of.npy"):
        paths = [tmp_path / place / alone._store.folder.name / name for place in ("one", "many")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in (tmp_path / "many").iterdir() if not path.name.startswith(".")) == [
        many._store.folder.name
    ]


def test_a_bad_record_in_a_worker_is_reported_as_in_this_process(tmp_path):
    source = SourceConfig(path=write(tmp_path / "a.jsonl", [*ALPACA, {"instruction": 3, "output": ""}]))
    for num_workers in (1, 2):
        with pytest.raises(UserError, match=r"a\.jsonl, line 41: field instruction is a number, expected text.*skip"):
            build(tmp_path, source, num_workers=num_workers)


# --- lengths ---


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=12),
    st.integers(8, 120),
    st.sampled_from(["truncate", "drop"]),
    st.sampled_from(["text", "prompt-completion"]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_token_is_in_a_packed_row_once_or_counted_as_lost(tmp_path_factory, sizes, row_tokens, on_long, kind):
    tmp_path = tmp_path_factory.mktemp("lengths")
    words = ["x " * size + "end" for size in sizes]
    rows = [{"text": word} if kind == "text" else {"prompt": "q", "completion": word} for word in words]
    source = SourceConfig(path=write(tmp_path / "a.jsonl", rows), format=kind)
    whole = build(tmp_path, source, row_tokens=10_000)
    try:
        documents = build(tmp_path, source, row_tokens=row_tokens, on_long=on_long)
    except UserError as error:
        assert "were dropped because they are longer" in str(error)
        return
    packed = pack_best_fit(documents.lengths, row_tokens, seed=0)
    assert packed.tokens.sum() + documents.stats.total("lost_tokens") == whole.lengths.sum()
    assert packed.tokens.max() <= row_tokens
    stats = documents.stats.sources[0]
    if kind == "text" and on_long == "truncate":
        # a piece of one token has nothing to learn
        assert stats.truncated == 0 and stats.lost_tokens <= stats.split
    else:
        assert stats.truncated + stats.dropped == (whole.lengths > row_tokens).sum()


def test_a_truncated_conversation_is_counted_and_a_long_text_is_split_instead(tmp_path):
    chat = SourceConfig(path=write(tmp_path / "c.jsonl", [{"prompt": "q", "completion": "a " * 300}]))
    text = SourceConfig(path=write(tmp_path / "t.jsonl", [{"text": "a " * 300}]))
    documents = build(tmp_path, chat, text, row_tokens=100)
    first, second = documents.stats.sources
    assert (first.truncated, first.split, first.examples) == (1, 0, 1) and first.lost_tokens > 0
    assert (second.truncated, second.split, second.lost_tokens) == (0, 1, 0) and second.examples == 4
    eos = byte_level_tokenizer().eos_token_id
    assert documents[0].input_ids[-1] != eos and documents[len(documents) - 1].input_ids[-1] == eos
    joined = np.concatenate([documents[i].input_ids for i in range(1, len(documents))])
    assert byte_level_tokenizer().decode(joined) == "a " * 300 + "<|endoftext|>"


def test_documents_that_are_too_long_are_an_error_if_configured_or_if_none_are_left(tmp_path):
    source = SourceConfig(path=write(tmp_path / "c.jsonl", [{"prompt": "q " * 300, "completion": "a"}]))
    with pytest.raises(UserError, match=r"c\.jsonl, line 1: 6\d\d tokens but data.row_tokens is 64"):
        build(tmp_path, source, row_tokens=64, on_long="error")
    with pytest.raises(
        UserError, match=r"all 1 examples were dropped because they are longer than data\.row_tokens 64"
    ):
        build(tmp_path, source, row_tokens=64)


def test_plain_text_gets_bos_and_eos_once_even_if_it_spells_them_out(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    source = SourceConfig(path=write(tmp_path / "t.jsonl", [{"text": "Hello there"}, {"text": "<s>Hello there</s>"}]))
    documents = build(tmp_path, source, tokenizer=tokenizer)
    for i in range(2):
        ids = documents[i].input_ids.tolist()
        assert (ids[0], ids[-1]) == (1, 2) and ids.count(1) == ids.count(2) == 1
        assert documents[i].is_label.tolist() == [False] + [True] * (len(ids) - 1)


def test_token_ids_from_elsewhere_are_used_as_they_are_and_checked(tmp_path):
    rows = [{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}]
    documents = build(tmp_path, SourceConfig(path=write(tmp_path / "a.jsonl", rows)))
    assert documents[0].input_ids.tolist() == [1, 5, 6, 2] and documents.num_labels.tolist() == [2]
    foreign = SourceConfig(path=write(tmp_path / "b.jsonl", [{"input_ids": [1, 99_999]}]))
    with pytest.raises(
        UserError, match="contains 99999, but this tokenizer has 400 tokens: the data was tokenized with another"
    ):
        build(tmp_path, foreign)


# --- bad data ---


def test_bad_records_are_skipped_and_counted_and_the_good_ones_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, ALPACA[:2])
    with path.open("a") as file:
        file.write('{"instruction": \n[1]\n{"instruction": "x", "output": null}\n')
    source = SourceConfig(path=str(path))
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not valid JSON.*data.on_bad=skip"):
        build(tmp_path, source)
    documents = build(tmp_path, source, on_bad="skip")
    stats = documents.stats.sources[0]
    assert (stats.records, stats.examples, stats.bad) == (5, 2, 3)
    assert "line 3: not valid JSON" in stats.first_bad


def test_a_huge_record_is_reported_and_its_neighbours_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_dist.data.documents.encode._MAX_CHARACTERS", 500)
    source = SourceConfig(path=write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b" * 501}, {"text": "c"}]))
    with pytest.raises(UserError, match=r"line 2: 501 characters, expected at most 500"):
        build(tmp_path, source)
    documents = build(tmp_path, source, on_bad="skip")
    assert (len(documents), documents.stats.sources[0].bad) == (2, 1)


def test_mixed_columns_are_reported_by_the_row_that_differs(tmp_path):
    source = SourceConfig(path=write(tmp_path / "a.jsonl", [*ALPACA, {"prompt": "x", "completion": "y"}]))
    with pytest.raises(UserError, match="line 41: field instruction is missing; this record has prompt, completion"):
        build(tmp_path, source)


# --- the hub ---


@pytest.fixture
def hub(monkeypatch):
    """Replaces the hub client: one dataset, `someone/set`, with a train and a test split."""
    import datasets

    splits = {"train": datasets.Dataset.from_list(ALPACA[:30]), "test": datasets.Dataset.from_list(ALPACA[30:])}

    def load_dataset(name, subset, *, split, revision, streaming):
        if name != "someone/set":
            raise FileNotFoundError(name)
        return splits[split].to_iterable_dataset() if streaming else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, subset, revision: list(splits))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_datasets_are_read_whole_or_as_a_stream_with_their_own_split_held_out(tmp_path, hub, streaming):
    source = SourceConfig(path="someone/set", streaming=streaming, hold_out=0.1)
    train, evaluate = split_sources([source], [])
    assert evaluate[0].split == "test"
    documents = build(tmp_path, *train)
    assert len(documents) == 30 and len(build(tmp_path, *evaluate)) == 10
    assert answers(documents)[0] == ALPACA[0]["output"] + "<|endoftext|>"
    capped = build(tmp_path, SourceConfig(path="someone/set", streaming=streaming, max_examples=4))
    assert len(capped) == 4


def test_a_bad_record_of_a_hub_dataset_is_reported_by_its_row(tmp_path, hub):
    source = SourceConfig(path="someone/set", format="alpaca", columns={"answer": "output"})
    with pytest.raises(UserError, match=r"someone/set \[train\], row 1: field output is missing"):
        build(tmp_path, source)


def test_sources_without_usable_records_are_rejected(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        build(tmp_path, SourceConfig(path=str(tmp_path / "empty.jsonl")))
    bad = SourceConfig(path=write(tmp_path / "bad.jsonl", [{"instruction": "x", "output": 1}]))
    with pytest.raises(
        UserError, match=r"none of 1 records can be used; the first: .*line 1: field output is a number"
    ):
        build(tmp_path, bad, on_bad="skip")
    with pytest.raises(UserError, match="neither a local file nor a dataset that can be loaded from the hub"):
        build(tmp_path, SourceConfig(path="nobody/nothing"))


def test_a_slow_tokenizer_is_rejected():
    with pytest.raises(UserError, match="is a slow tokenizer"):
        build_documents([], object(), row_tokens=8, cache_dir="/nonexistent")


def test_duplicates_and_empty_answers_and_control_tokens_are_counted(tmp_path):
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b"},
        {"instruction": "c", "output": ""},
        {"instruction": "what is <|endoftext|>?", "output": "a token"},
    ]
    stats = build(tmp_path, SourceConfig(path=write(tmp_path / "a.jsonl", rows))).stats.sources[0]
    assert (stats.duplicates, stats.empty_answers, stats.control_tokens) == (1, 1, 1)


# --- mixing ---


def test_weights_repeat_examples_or_choose_a_seeded_fraction(tmp_path, alpaca):
    def of(weight, seed=0):
        return answers(build(tmp_path, alpaca.model_copy(update={"weight": weight}), seed=seed))

    every = answers(build(tmp_path, alpaca))
    assert sorted(of(2.0)) == sorted(every * 2)
    half = of(0.5)
    assert len(half) == 20 and set(half) < set(every)
    assert half == of(0.5) and half != of(0.5, seed=1)
    assert len(of(1.25)) == 50 and set(of(1.25)) == set(every)


def test_a_cap_takes_the_first_records_or_a_seeded_choice_of_them(tmp_path, alpaca):
    every = answers(build(tmp_path, alpaca))
    assert answers(build(tmp_path, alpaca.model_copy(update={"max_examples": 5}))) == every[:5]
    chosen = answers(build(tmp_path, alpaca.model_copy(update={"max_examples": 5, "shuffle": True})))
    assert len(chosen) == 5 and chosen != every[:5] and set(chosen) < set(every)


def test_weights_caps_and_seeds_choose_without_tokenizing_again(tmp_path, alpaca, monkeypatch):
    fingerprint = build(tmp_path, alpaca).fingerprint
    monkeypatch.setattr(build_module.Build, "run", None)
    changed = {"weight": 2.0, "max_examples": 5, "shuffle": True}
    assert build(tmp_path, alpaca.model_copy(update=changed), seed=3).fingerprint != fingerprint
    assert build(tmp_path, alpaca, seed=3).fingerprint == fingerprint


@pytest.mark.parametrize("hold_out", [0.25, 10])
def test_held_out_records_are_evaluated_and_never_trained_on(tmp_path, alpaca, hold_out):
    train, evaluate = split_sources([alpaca.model_copy(update={"hold_out": hold_out})], [])
    trained, held_out = answers(build(tmp_path, *train)), answers(build(tmp_path, *evaluate))
    assert len(held_out) == 10 and len(trained) == 30
    assert sorted(trained + held_out) == sorted(answers(build(tmp_path, alpaca)))
    other_seed = answers(build(tmp_path, *evaluate, seed=1))
    assert held_out == answers(build(tmp_path, *evaluate)) != other_seed


def test_holding_out_everything_is_rejected(tmp_path, alpaca):
    with pytest.raises(UserError, match="hold_out 40 of 40 records leaves none to train on"):
        build(tmp_path, alpaca.model_copy(update={"hold_out": 40, "part": "train"}))


def test_a_datasets_own_validation_split_is_used_if_it_has_one(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", ALPACA[:30])
    write(folder / "test.jsonl", ALPACA[30:])
    train, evaluate = split_sources([SourceConfig(path=str(folder), hold_out=0.5)], [])
    assert len(build(tmp_path, *train)) == 30 and len(build(tmp_path, *evaluate)) == 10
    _, evaluate = split_sources([SourceConfig(path=str(folder))], [SourceConfig(path=str(folder))])
    assert evaluate[0].split == "test"
    write(folder / "validation.jsonl", ALPACA[30:35])
    _, evaluate = split_sources([SourceConfig(path=str(folder))], [SourceConfig(path=str(folder))])
    assert evaluate[0].split == "validation"


def test_several_sources_follow_one_another_each_in_its_own_format(tmp_path, alpaca):
    other = SourceConfig(
        path=write(tmp_path / "q.jsonl", [{"q": "2+2", "a": "4"}]), columns={"prompt": "q", "completion": "a"}
    )
    documents = build(tmp_path, other, alpaca)
    assert [source.format for source in documents.stats.sources] == ["prompt-completion", "alpaca"]
    assert texts(documents)[0] == "2+24<|endoftext|>" and documents.source_of.tolist() == [0] + [1] * 40


# --- real samples ---


@pytest.mark.parametrize("name", ["llama2_hf", "mistral_v3_hf", "gpt2_hf"])
@pytest.mark.parametrize("template", ["auto", "chatml", "zephyr"])
def test_real_conversations_with_real_tokenizers_learn_exactly_the_answers(tmp_path, name, template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_file(f"tokenizers/{name}"))
    path = shared_file("instruct/oasst_chat_messages.jsonl")
    source = SourceConfig(path=str(path), max_examples=40)
    documents = build(tmp_path, source, tokenizer=tokenizer, row_tokens=100_000, template=template)
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()[:40]]
    for i, messages in enumerate(rows):
        example = documents[i]
        learned = tokenizer.decode(example.input_ids[example.is_label])
        for message in messages:
            if message["role"] == "assistant":
                content = message["content"].strip()
                assert content in learned
                learned = learned.replace(content, "", 1)
        end = "<|im_end|>" if template == "chatml" else tokenizer.eos_token
        # only end tokens and the template's spaces are left
        assert learned.replace(end, "").strip() == ""


def test_tool_calls_of_real_data_are_read_and_learned(tmp_path):
    path = shared_file("instruct/glaive_toolcall_sharegpt.json")
    documents = build(tmp_path, SourceConfig(path=str(path)), template="chatml", row_tokens=100_000)
    assert len(documents) == 240
    assert sum("<tool_call>" in text for text in answers(documents)) > 80
    assert not any("<tool_response>" in text for text in answers(documents))
