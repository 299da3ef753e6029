"""Configs, options and data of any content: a result or the documented error, in bounded time and memory.

Never another error. The examples are drawn anew by each change of a strategy, but are the same in every run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzz import (
    BYTES,
    CONFIG,
    FULL,
    TEXTS,
    VALUES,
    YAML,
    OutOfBounds,
    altered,
    ends,
    examples,
    json_text,
    mutated,
    objects,
    places_of,
    shared_folder,
    write,
)
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.config import RunConfig, load_config, parse_config
from qlora_dist.config.reading import dump_yaml, parse_yaml
from qlora_dist.data.formats import FORMATS, BadRecord, RawRecord, convert, detect_format, group_records, read_file
from qlora_dist.errors import UserError

# --- config -----------------------------------------------------------------------------------------------------------


@examples(100)
@given(text=YAML)
def test_any_yaml_text_gives_plain_data_or_says_what_is_wrong(text: str) -> None:
    ends(lambda: parse_yaml(text, "config x"), UserError)


@examples(120)
@given(text=altered(FULL))
def test_a_config_of_any_values_is_accepted_or_refused(text: str) -> None:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(raw, dict):
        ends(lambda: parse_config(raw), UserError)


@examples(20)
@given(text=altered(CONFIG))
def test_a_config_file_of_any_content_is_read_or_refused_and_what_is_read_can_be_written(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(shared_folder(tmp_path_factory, "config") / "c.yaml", text)
    config: RunConfig | None = ends(lambda: load_config(path), UserError)
    if config is not None:
        again = ends(lambda: parse_config(parse_yaml(dump_yaml(config), "dumped")))
        assert again == config


@pytest.mark.parametrize("levels", [3, 12, 400])
@pytest.mark.parametrize("width", [2, 9])
def test_aliases_that_expand_to_anything_are_refused(levels: int, width: int, tmp_path: Path) -> None:
    lines = ["a0: &a0 x"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    path = write(tmp_path / "c.yaml", "\n".join([*lines, "loop: &loop [*loop]"]))
    assert ends(lambda: load_config(path), UserError) is None


KEYS = [".".join(map(str, place)) for place in places_of(FULL)]
PIECES = st.sampled_from(KEYS) | st.sampled_from(
    [
        "data.train.0.path",
        "data.train.-1.path",
        "data.train.²",
        "data.train.9999999999.path",
        "a..b",
        ".",
        "=",
        "\x1b",
        "",
    ]
)


@examples(120)
@given(override=st.builds(str.__add__, PIECES | TEXTS, st.builds("={}".format, YAML | VALUES.map(json_text)) | TEXTS))
def test_any_override_is_applied_or_refused(override: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(shared_folder(tmp_path_factory, "set") / "c.yaml", json.dumps(CONFIG))
    ends(lambda: load_config(path, (override,)), UserError)


# --- data -------------------------------------------------------------------------------------------------------------

RECORDS = json.dumps([{"instruction": "a", "output": "é"}, {"instruction": 5}, [1], {"text": "\\ud83d"}], indent=1)
LINES = '{"text": "a"}\n{"text": 1e999, "b": [{}]}\n\n[]\n{"text": "\\ud800"}\n'
TABLE = 'instruction,output\n"a ""b""",c\n"two\nlines",d\ne\n'
FILES = {
    ".json": [RECORDS, LINES],
    ".jsonl": [LINES],
    ".csv": [TABLE],
    ".tsv": [TABLE.replace(",", "\t")],
    ".txt": ["a\n<|endoftext|>\nb\n"],
}
CONTENTS = st.sampled_from([(suffix, text.encode()) for suffix, texts in FILES.items() for text in texts]).flatmap(
    lambda one: st.tuples(st.just(one[0]), mutated(one[1]) | st.binary(max_size=40) | VALUES.map(_bytes))
)


def _bytes(value: Any) -> bytes:
    return json_text(value).encode("utf-8", "surrogatepass")


@examples(120)
@given(content=CONTENTS)
def test_a_data_file_of_any_content_gives_records_or_says_where_it_ends(
    content: tuple[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(shared_folder(tmp_path_factory, "data") / f"d{content[0]}", content[1])
    for record in ends(lambda: list(read_file(path)), UserError) or []:
        assert (record.fields is None) == bool(record.problem) and str(path) in record.where


def _parquet(folder: Path, suffix: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"instruction": ["a", "b"], "output": [["c"], None]})
    path = folder / f"good{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_that_was_cut_off_anywhere_gives_rows_or_says_so(suffix: str, tmp_path: Path) -> None:
    """Not with changed bytes: Arrow's own code is not made for files that want to harm."""
    content = _parquet(tmp_path, suffix)
    for end in range(0, len(content), 31):
        path = write(tmp_path / f"d{suffix}", content[:end])
        ends(lambda path=path: list(read_file(path)), UserError)


COLUMNS = [
    "instruction", "input", "output", "response", "context", "messages", "conversations", "role", "content", "from",
    "value", "text", "prompt", "completion", "instances", "chosen", "rejected", "input_ids", "labels", "attention_mask",
    "tools", "tool_calls", "function", "arguments", "name", "system", "history", "weight", "replies", "rank", "deleted",
    "message_id", "parent_id", "source", "subset", "reasoning_content", "type", "mask", "instruction_with_input",
]  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "prompter"])
WORDS = st.sampled_from(
    ["a", "", "### Human: a### Assistant: b", "\n\nHuman: a\n\nAssistant: b", "<human>: a\n<bot>: b"]
)
TURNS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), ROLES | WORDS | VALUES, max_size=4), max_size=3)
INNER = st.one_of(ROLES, WORDS, VALUES, TURNS, st.dictionaries(st.sampled_from(COLUMNS), WORDS | TURNS, max_size=3))


@examples(150)
@given(record=objects(COLUMNS, INNER), columns=st.dictionaries(st.sampled_from(COLUMNS), TEXTS, max_size=1))
def test_a_record_of_any_values_is_converted_or_bad_in_every_format(
    record: dict[str, Any], columns: dict[str, str]
) -> None:
    ends(lambda: detect_format(record, "d.json"), UserError)
    for name in FORMATS:
        ends(lambda name=name: convert(name, RawRecord(record, "here"), columns), BadRecord)


IDS = st.sampled_from(["a", "b", "c", "", 1, None]) | VALUES


@examples(70)
@given(
    nodes=st.lists(
        st.fixed_dictionaries(
            {"message_id": IDS, "parent_id": IDS, "role": ROLES | VALUES, "text": WORDS | VALUES},
            optional={"rank": VALUES, "deleted": VALUES, "replies": VALUES},
        ),
        max_size=6,
    )
)
def test_messages_of_any_ids_become_trees_and_none_is_lost(nodes: list[dict[str, Any]]) -> None:
    raw = [RawRecord(node, f"record {i}") for i, node in enumerate(nodes)]
    grouped = ends(lambda: list(group_records("oasst", iter(raw))))
    for one in grouped:
        ends(lambda one=one: convert("oasst", one, {}), BadRecord)
    lost = {record.where for record in raw} - {one.where for one in grouped}
    inside = {
        f"record {i}" for i, node in enumerate(nodes) if any(node["parent_id"] == root["message_id"] for root in nodes)
    }
    assert lost <= inside


def test_a_chain_of_any_length_is_one_record_in_bounded_time() -> None:
    nodes = [
        {"message_id": str(i), "parent_id": str(i - 1) if i else None, "role": "prompter", "text": "a"}
        for i in range(5_000)
    ]
    (tree,) = ends(lambda: list(group_records("oasst", (RawRecord(node, "here") for node in nodes))))
    ends(lambda: convert("oasst", tree, {}), BadRecord)


def test_the_bounds_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin() -> None:
        while True:
            pass

    with pytest.raises(MemoryError):
        ends(lambda: bytearray(2 * BYTES), UserError)
    monkeypatch.setattr("helpers.fuzz.SECONDS", 0.05)
    with pytest.raises(OutOfBounds):
        ends(spin, Exception)
