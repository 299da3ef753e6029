"""Every format gives the conversations that a person would read in it; every error gives its location."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from helpers.shared_data import shared_file

from qlora_dist.config.sections import DataFormat
from qlora_dist.data.formats import (
    FORMATS,
    BadRecord,
    Conversation,
    available_splits,
    detect_format,
    find_files,
    group_records,
    map_columns,
    read_file,
)
from qlora_dist.errors import UserError

SAMPLES = Path(__file__).parents[1] / "data" / "formats"
EXPECTED = json.loads((Path(__file__).parents[1] / "data" / "formats_expected.json").read_text())
EXPECTED_SHARED = json.loads((Path(__file__).parents[1] / "data" / "formats_expected_shared.json").read_text())


def documents_of(path: Path, columns: dict[str, str] | None = None) -> tuple[str, list[dict]]:
    """The detected format and all documents as plain data."""
    records = list(read_file(path))
    name, _ = detect_format(map_columns(records[0].fields, columns or {}), str(path))
    documents = []
    for raw in group_records(name, iter(records)):
        converted = FORMATS[name](map_columns(raw.fields, columns or {}))
        converted = converted if isinstance(converted, list) else [converted]
        documents += [dataclasses.asdict(document) for document in converted]
    return name, documents


def digest(documents: list[dict]) -> str:
    return hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", sorted(path.name for path in SAMPLES.iterdir()))
def test_a_small_sample_of_each_format_is_detected_and_read_as_expected(name):
    detected, documents = documents_of(SAMPLES / name)
    assert {"format": detected, "documents": documents} == EXPECTED[name]


def test_there_is_a_small_sample_of_every_format():
    aliases = {"alpaca-cleaned", "alpaca-gpt4"}
    assert {entry["format"] for entry in EXPECTED.values()} | aliases == set(FORMATS)
    assert {*FORMATS, "auto"} == set(DataFormat.__args__)


@pytest.mark.parametrize("entry", EXPECTED_SHARED, ids=lambda entry: entry["file"])
def test_real_samples_give_the_documents_that_were_checked_by_eye(entry):
    detected, documents = documents_of(shared_file(entry["file"]), entry["columns"])
    assert (detected, len(documents), digest(documents)) == (entry["format"], entry["documents"], entry["sha256"])


def test_names_of_alpaca_variants_mean_the_same_columns():
    record = {"instruction": "a", "input": "", "output": "b"}
    assert FORMATS["alpaca-cleaned"](record) == FORMATS["alpaca-gpt4"](record) == FORMATS["alpaca"](record)


def test_the_users_columns_are_mapped_before_the_format_is_detected():
    record = map_columns({"question": "2+2?", "reply": "4", "id": 3}, {"instruction": "question", "output": "reply"})
    assert detect_format(record, "x")[0] == "alpaca"
    assert FORMATS["alpaca"](record).messages[1]["content"] == "4"


def test_an_undetectable_format_is_an_error_with_the_columns_and_the_remedy():
    with pytest.raises(UserError, match=r"a\.csv.*cannot detect.*question \(text\), n \(a number\).*columns: \{"):
        detect_format({"question": "x", "n": 3}, "a.csv")


@pytest.mark.parametrize(
    ("format_name", "record", "message"),
    [
        ("alpaca", {"instruction": "a"}, "field output is missing; this record has instruction"),
        ("alpaca", {"instruction": "a", "output": None}, "field output is null, expected text"),
        ("alpaca", {"instruction": 3, "output": "x"}, "field instruction is a number, expected text"),
        ("messages", {"messages": []}, "field messages is an empty list"),
        ("messages", {"messages": "hi"}, "field messages is text, expected a list"),
        ("messages", {"messages": [{"role": "user"}]}, r"field messages\[0\].content is missing"),
        ("messages", {"messages": [{"role": "bot", "content": ""}]}, r"messages\[0\].role is 'bot', expected one of"),
        ("messages", {"messages": [{"role": "assistant", "content": "x"}]}, "assistant, but follows no user message"),
        ("messages", {"messages": [{"role": "user", "content": "x"}] * 2}, "messages 1 and 2 both have role user"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "message 2 has role system",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\].content\[0\] is not text",
        ),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\].from is 'alien'"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}]},
            r"conversations\[1\].value is not valid JSON",
        ),
        ("guanaco", {"text": "no turns"}, "expected a turn that matches"),
        ("oasst", {"prompt": {"role": "prompter", "text": "x", "replies": []}}, "no assistant message"),
        ("text", {"text": " "}, "field text is empty"),
        ("tokens", {"input_ids": [1, 2], "labels": [2]}, "labels has 1 entries, but input_ids has 2"),
        ("tokens", {"input_ids": [1, 2], "labels": [2, -100]}, r"labels\[0\] is 2, expected -100 or the token 1"),
        ("tokens", {"input_ids": [1, "2"]}, r"input_ids\[1\] is text, expected a whole number"),
    ],
)
def test_errors_for_invalid_records_name_the_field_what_was_found_and_what_was_expected(format_name, record, message):
    with pytest.raises(BadRecord, match=message):
        FORMATS[format_name](record)


def test_prompt_and_completion_may_be_lists_of_messages():
    record = {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    assert [m["role"] for m in FORMATS["prompt-completion"](record).messages] == ["user", "assistant"]


def test_a_message_whose_parent_is_missing_is_reported_and_not_lost(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"message_id": "b", "parent_id": "a", "role": "assistant", "text": "x"}\n')
    (record,) = group_records("oasst", read_file(path))
    assert record.fields is None and "parent_id 'a' is not in the data" in record.problem


# --- files ---


def test_an_invalid_line_of_jsonl_is_reported_by_line_number_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": \n[1]\n{"text": "\xff"}\n{"text": "b"}\n')
    records = list(read_file(path))
    assert [r.where.split(", ")[1] for r in records] == ["line 1", "line 3", "line 4", "line 5", "line 6"]
    assert records[1].problem.startswith("not valid JSON") and "found a list" in records[2].problem
    assert "not UTF-8" in records[3].problem
    assert [r.fields["text"] for r in (records[0], records[4])] == ["a", "b"]


@pytest.mark.parametrize("size", [1, 1000, 400_000])
def test_a_json_list_is_streamed_record_by_record_whatever_the_record_size(tmp_path, size):
    rows = [{"text": str(i) * size, "n": [i, {"x": "]}"}]} for i in range(7)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=1))
    assert [r.fields for r in read_file(path)] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"text": "a"},\n{"text": }\n]', r"invalid JSON in record 2, line 3"),
        ('[{"text": "a"} {"text": "b"}]', r"after record 1, line 1: expected , or \] but found '\{'"),
        ('[{"text": "a"},\n', "invalid JSON in record 2"),
        ("hello", "expected a JSON list of objects, found 'h'"),
    ],
)
def test_an_invalid_json_list_is_reported_with_record_and_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_file(path))


def test_json_files_may_contain_one_object_per_line_or_one_object(tmp_path):
    lines, one = tmp_path / "lines.json", tmp_path / "one.json"
    lines.write_text('{"text": "a"}\n{"text": "b"}\n')
    one.write_text('{\n "text":\n "a"\n}\n')
    assert [r.fields["text"] for r in read_file(lines)] == ["a", "b"]
    assert [r.fields["text"] for r in read_file(one)] == ["a"]


def test_a_table_row_with_too_few_columns_is_reported_by_the_line_it_starts_on(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('input,output\n"a\nb",c\nd\n')
    good, bad = read_file(path)
    assert good.where.endswith("line 2") and bad.where.endswith("line 4")
    assert bad.problem == "1 columns, expected 2 (input, output)"


def test_parquet_rows_are_converted_to_plain_values(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import datetime

    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None], "at": [datetime.date(2024, 1, 2)] * 2}), path)
    assert [r.fields for r in read_file(path)] == [
        {"text": "a", "at": "2024-01-02"},
        {"text": None, "at": "2024-01-02"},
    ]


def test_a_text_file_larger_than_a_part_is_read_as_parts_of_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_dist.data.formats.readers._TEXT_PART", 10)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(6)))
    parts = list(read_file(path))
    assert "".join(part.fields["text"] for part in parts) == path.read_text()
    assert [(part.is_first, part.is_last) for part in parts] == [(True, False), (False, False), (False, True)]


def test_a_file_in_another_encoding_is_rejected_with_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"tea\ncaf\xe9")
    with pytest.raises(UserError, match=r"line 2 is not UTF-8"):
        list(read_file(path))


def test_errors_for_missing_and_unknown_files_give_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        find_files(str(tmp_path / "absent.json"))
    (tmp_path / "a.xml").write_text("x")
    with pytest.raises(UserError, match=r"unknown file type \.xml; expected one of \.json"):
        find_files(str(tmp_path / "a.xml"))
    with pytest.raises(UserError, match="no file in this folder ends in"):
        find_files(str(tmp_path))


def test_a_folder_has_the_splits_that_its_files_are_named_after(tmp_path):
    for name in ("train-00000.jsonl", "train-00001.jsonl", "valid.jsonl", "test/x.jsonl", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert [f.name for f in find_files(str(tmp_path))] == ["train-00000.jsonl", "train-00001.jsonl"]
    assert [f.name for f in find_files(str(tmp_path), "validation")] == ["valid.jsonl"]
    assert set(available_splits(str(tmp_path))) == {"train", "validation", "test"}


def test_a_conversation_keeps_separate_what_a_template_needs_separate():
    conversation = FORMATS["alpaca"]({"instruction": "i", "input": "x", "output": "o"})
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0] == {"role": "user", "content": "i\n\nx", "instruction": "i", "input": "x"}
