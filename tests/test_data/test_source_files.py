"""Files and folders of every layout are read whole, or refused by name; one bad record costs that record alone."""

import datetime
import errno
import json
import re
from pathlib import Path

import pytest

from qlora_dist.config import SourceConfig
from qlora_dist.data.documents.select import overlap_warning
from qlora_dist.data.documents.sources import open_source
from qlora_dist.data.formats import available_splits, find_files, group_records, json_text, read_file
from qlora_dist.data.formats.files import read_hub
from qlora_dist.errors import MachineFailed, UserError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path: Path, count: int) -> Path:
    return write(path, "".join(f'{{"text": "{i}"}}\n' for i in range(count)))


def texts(source: SourceConfig) -> list[str]:
    return [raw.fields["text"] for raw in open_source(source).records]


# --- one file ---

DEEP = "[" * 3000 + '"]\\""' + "]" * 3000


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (DEEP, "nested too deeply"),
        ("9" * 5000, "thousands of digits"),
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ("[" + "9" * 5000 + ', "]"]', "thousands of digits"),
    ],
)
@pytest.mark.parametrize("is_field", [True, False])
def test_a_record_that_python_cannot_hold_costs_that_record_alone(tmp_path, bad, problem, is_field):
    bad = f'{{"x": {bad}}}' if is_field else bad
    records = ['{"text": "a"}', bad, '{"text": "b"}']
    for path in (
        write(tmp_path / "list.json", "[" + ", ".join(records) + "]"),
        write(tmp_path / "lines.jsonl", "\n".join(records)),
    ):
        first, second, third = read_file(path)
        assert (first.fields["text"], third.fields["text"]) == ("a", "b")
        assert problem in second.problem and second.where in (f"{path}, record 2", f"{path}, line 2")


def test_the_end_of_a_value_is_found_without_decoding_it_unless_the_text_is_cut_off():
    assert json_text.end_of_value('["a ]", {"\\"": 1}] x', 0) == 18
    assert [json_text.end_of_value(cut, 0) for cut in ('["a ]', '{"a": [1]', "999")] == [None] * 3
    assert json_text.end_of_value("999, 1", 0) == 3


def test_a_damaged_first_line_does_not_hide_the_others_of_a_json_file(tmp_path):
    for first in ('{"x": ' + DEEP + "}", '{"text": "x",}'):
        records = list(read_file(write(tmp_path / "a.json", first + '\n{"text": "b"}\n')))
        assert records[0].problem and records[1].fields == {"text": "b"}


@pytest.mark.parametrize("rest", ['\n[{"text": "b"}]', " x", ","])
def test_text_after_a_json_list_is_an_error_and_not_lost(tmp_path, rest):
    path = write(tmp_path / "a.json", '[{"text": "a"}\n]' + rest)
    with pytest.raises(UserError, match=r"a\.json.*after the end of the list, line [23]: found"):
        list(read_file(path))
    assert len(list(read_file(write(tmp_path / "b.json", '[{"text": "a"}]\n \n')))) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_utf16_is_called_by_its_name(tmp_path, encoding, suffix):
    path = write(tmp_path / f"a{suffix}", '{"text": "a"}\n'.encode(encoding))
    with pytest.raises(UserError, match=r"the file is UTF-16, expected UTF-8; .*iconv"):
        list(read_file(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b,a\n1,2,3\n", "two columns are named 'a'"), ('a,"b\n1,2\n', "invalid header, line 2")],
)
def test_a_table_with_an_unusable_header_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        list(read_file(write(tmp_path / "a.csv", content)))


def test_a_table_may_begin_with_empty_lines(tmp_path):
    (record,) = read_file(write(tmp_path / "a.csv", "\n\ntext\nx\n"))
    assert record.fields == {"text": "x"}


def test_nulls_that_a_table_adds_to_tools_and_arguments_are_removed(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    def record(name, kind):
        call = {"function": {"name": "f", "arguments": {name: [{name: 1}]}}}
        return {
            "messages": [{"role": "assistant", "content": None, "tool_calls": [call]}],
            "tools": [{"function": {"name": "f", "parameters": {"properties": {name: {"type": kind}}}}}],
        }

    records = [record("city", "string"), record("a", "number")]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert [raw.fields for raw in read_file(path)] == records  # the null outside, content, stays


def test_a_date_that_python_cannot_hold_costs_its_row_alone(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    days = pyarrow.array([1, 2**31 - 1, 2], pyarrow.int32()).cast(pyarrow.date32())
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "day": days}), path)
    records = list(read_file(path))
    assert [raw.fields and raw.fields["text"] for raw in records] == ["a", None, "c"]
    assert records[0].fields["day"] == str(datetime.date(1970, 1, 2))
    assert records[1].where.endswith("row 2") and "cannot hold" in records[1].problem


def test_damaged_pages_are_named_with_the_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(1000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[10:400] = bytes(390)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: (not a parquet file|cannot be read)"):
        list(read_file(path))


def test_a_disk_that_fails_while_a_file_is_read_is_named_and_may_be_tried_again(tmp_path, monkeypatch):
    path = lines(tmp_path / "a.jsonl", 1)

    def fail(self, *args, **kwargs):
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(MachineFailed, match=r"reading data source .*a\.jsonl.*Input/output error"):
        list(read_file(path))


# --- trees of messages ---


def message(name, parent, role="assistant", **more):
    return {"message_id": name, "parent_id": parent, "role": role, "text": "x", **more}


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ([message("c", "c")], "ends at no first message"),
        ([message("c", "d"), message("d", "c")], "ends at no first message"),
        ([message("a", "a")], "message_id 'a' is also that of .*line 1"),
        ([message(["c"], None)], "message_id and parent_id are a list and null"),
        ([message("c", {"x": 1})], "message_id and parent_id are text and an object"),
        ([message("c", "gone"), message("d", "c")], "is not in the data|ends at no first message"),
    ],
)
def test_a_message_that_belongs_to_no_tree_is_refused_by_its_row_and_the_good_tree_kept(tmp_path, bad, problem):
    good = [message("a", None, "prompter"), message("b", "a")]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, good + bad)))
    *refused, tree = group_records("oasst", read_file(path))
    assert tree.fields["prompt"]["replies"][0]["message_id"] == "b"
    assert [raw.where for raw in refused] == [f"{path}, line {3 + i}" for i in range(len(bad))]
    assert all(raw.fields is None and re.search(problem, raw.problem) for raw in refused)


# --- splits ---


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, range(10)),
        ("train", range(10)),
        ("train[:90%]", range(9)),
        ("train[90%:]", range(9, 10)),
        ("train[2:5]", range(2, 5)),
        ("train[-3:]", range(7, 10)),
        ("train[:-25%]", range(8)),
        ("train[5:2]", range(0)),
        ("train[8:100]", range(8, 10)),
    ],
)
def test_a_part_of_a_split_is_read_from_a_file_and_a_folder_as_from_the_hub(tmp_path, split, expected):
    file = lines(tmp_path / "a.jsonl", 10)
    for path in (file, tmp_path):
        assert texts(SourceConfig(path=str(path), split=split)) == [str(i) for i in expected]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("a.jsonl", "test", "split is test, but by its name this file is the split train"),
        ("dev.jsonl", "train[:5]", "by its name this file is the split validation"),
        ("a.jsonl", "train[:5]+train[7:]", "cannot be read from files; expected a name"),
        ("a.jsonl", "train[x:]", "cannot be read from files"),
    ],
)
def test_a_split_that_a_file_does_not_have_is_refused(tmp_path, name, split, message):
    with pytest.raises(UserError, match=message):
        open_source(SourceConfig(path=str(lines(tmp_path / name, 10)), split=split))


@pytest.mark.parametrize("option", ["subset", "revision"])
def test_options_of_the_hub_are_refused_for_a_file(tmp_path, option):
    with pytest.raises(UserError, match=f"{option} is set, which only hub datasets have"):
        open_source(SourceConfig(path=str(lines(tmp_path / "a.jsonl", 1)), **{option: "x"}))


def test_documents_on_both_sides_are_counted():
    import numpy as np

    assert overlap_warning(np.array([1, 2, 3]), np.array([2, 3, 4])).startswith("2 of 3 evaluation examples also")
    assert overlap_warning(np.array([1]), np.array([2])) is None


# --- folders ---


def test_a_folder_of_save_to_disk_is_read_without_its_caches(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": str(i)} for i in range(5)])
    data.save_to_disk(tmp_path / "one", num_shards=2)
    write(tmp_path / "one" / "cache-123.arrow", b"not data")
    assert texts(SourceConfig(path=str(tmp_path / "one"))) == ["0", "1", "2", "3", "4"]
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "both")
    assert set(available_splits(str(tmp_path / "both"))) == {"train", "test"}
    assert texts(SourceConfig(path=str(tmp_path / "both"), split="test")) == ["1"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "lists no data files"),
        ('{"_data_files": [{"filename": "../../x.arrow"}]}', "lists no data files"),
        ('{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow.*is missing"),
    ],
)
def test_a_damaged_folder_of_save_to_disk_is_refused_by_name(tmp_path, state, message):
    write(tmp_path / "dataset_info.json", "{}")
    write(tmp_path / "state.json", state)
    with pytest.raises(UserError, match=message):
        find_files(str(tmp_path))


def test_a_clone_of_a_hub_dataset_is_read_without_what_is_about_it(tmp_path):
    lines(tmp_path / "data" / "train-00000-of-00001.jsonl", 2)
    lines(tmp_path / "data" / "test-00000-of-00001.jsonl", 1)
    for about in ("dataset_infos.json", ".git/x.json", ".cache/huggingface/download/y.jsonl"):
        write(tmp_path / about, "{}")
    card = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n---\n# Words\n"
    write(tmp_path / "README.md", card)
    assert texts(SourceConfig(path=str(tmp_path))) == ["0", "1"]
    write(tmp_path / "README.md", card.replace("---\n# Words", "- config_name: other\n---\n"))
    with pytest.raises(UserError, match=r"several configurations \('default, other'\)"):
        find_files(str(tmp_path))


def test_a_folder_of_llama_factory_is_refused_with_the_names_of_its_files(tmp_path):
    lines(tmp_path / "alpaca.json", 1)
    write(tmp_path / "dataset_info.json", json.dumps({"alpaca_en": {"file_name": "alpaca.json"}}))
    with pytest.raises(UserError, match=r"folder of LLaMA-Factory.*alpaca_en = alpaca\.json.*give the path of one"):
        find_files(str(tmp_path))
    assert len(find_files(str(tmp_path / "alpaca.json"))) == 1


def test_entries_of_a_folder_that_cannot_be_read_are_named_and_not_skipped(tmp_path, monkeypatch):
    lines(tmp_path / "a.jsonl", 1)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"b\.jsonl: not a readable file"):
        find_files(str(tmp_path))
    (tmp_path / "b.jsonl").unlink()
    packed = write(tmp_path / "c.jsonl.gz", b"x")
    with pytest.raises(UserError, match=r"c\.jsonl\.gz: compressed files are not read"):
        find_files(str(tmp_path))
    packed.unlink()

    def fail(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", fail)
    with pytest.raises(UserError, match=r"reading data source .*Permission denied"):
        find_files(str(tmp_path))


# --- the hub ---


def test_the_commit_of_a_streamed_dataset_is_read_and_is_in_its_fingerprint(monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    asked = []

    class Api:
        def dataset_info(self, name, revision, timeout):
            if name == "someone/offline":
                raise ConnectionError
            return type("Info", (), {"sha": f"commit of {revision}"})

    def load_dataset(name, subset, *, split, revision, streaming):
        asked.append(revision)
        return iter([{"text": "a"}])

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _, fingerprint, _ = read_hub("someone/set", split="train", revision="main", streaming=True)
    assert "commit of main" in fingerprint
    assert "/v1" in read_hub("someone/offline", split="train", revision="v1", streaming=True)[1]
    assert asked == ["commit of main", "v1"]


@pytest.mark.parametrize(("error", "kind"), [(OSError("lost"), MachineFailed), (TypeError("odd"), UserError)])
def test_a_stream_that_breaks_is_named_with_its_row(monkeypatch, error, kind):
    datasets = pytest.importorskip("datasets")

    def rows():
        yield {"text": "a"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    records, _, _ = read_hub("someone/set", split="train", streaming=True)
    assert next(records).fields == {"text": "a"}
    with pytest.raises(kind, match=r"someone/set \[train\].* after row 1"):
        next(records)
