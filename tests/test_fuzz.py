"""Whatever a file or an option holds: a result or the documented error, in bounded time and memory; no traceback.

Each test feeds one reader with what hypothesis makes up, always the same. The bounds are far below what a bomb that is
unpacked, or a circle that is walked, would take.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qlora_dist.commands.supervise.exit_report import read_outcome
from qlora_dist.config import load_config
from qlora_dist.config.run_dir import RunDir, config_changes, read_metrics
from qlora_dist.data.formats import FORMATS, BadRecord, RawRecord, convert, detect_format, group_records, read_file
from qlora_dist.errors import UserError
from qlora_dist.memory.families import shapes_from_config
from qlora_dist.memory.read_shapes import read_config_json
from qlora_dist.model.lora_files import read_adapter_config
from qlora_dist.model.weights.safetensors_files import BadFile, WeightFiles
from qlora_dist.model.weights.sources import _check_index
from qlora_dist.train.checkpoint import find_newest, save_checkpoint
from qlora_dist.train.prompt_format import PromptFormat

SECONDS, MEBIBYTES = 10, 256


def examples(number: int) -> settings:
    """So many, the same each time."""
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


@contextmanager
def bounded() -> Iterator[Path]:
    """A new folder; the block must end within SECONDS and take less than MEBIBYTES."""
    started, before = time.monotonic(), getrusage(RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
    assert time.monotonic() - started < SECONDS
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < MEBIBYTES * 2**10  # in KiB


# --- values of any kind -----------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**64), 10**300, 1e300, float("inf"), float("nan"), -0.0, 0.5]),
)
TEXTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["", "\0", "\x1b[2J", "user", "assistant", "prompter", "system", "gpt", "a" * 10_000, "~nobody/x", "1e999"]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
DEEP = st.sampled_from(["[" * 10**5, '{"a":' * 10**5, "[" * 900 + "]" * 900, "9" * 5000, '{"a": ' + "9" * 5000 + "}"])
BROKEN = st.sampled_from(
    ['"\\ud800"', "{", "[1, 2", '{"a": 1, "a": 2}', "nul", "\ufeff{}", "", " ", "{} {}", "[] []", "NaN"]
)


def as_json(value: Any) -> str:
    return json.dumps(value)


JSON_TEXTS = st.one_of(VALUES.map(as_json), DEEP, BROKEN)
BYTES = st.one_of(JSON_TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=30))


def leaves(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of nested plain data, the inner nodes included."""
    yield way
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*way, key))


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """Nested plain data with another value at one place."""
    if not way:
        return new
    copy = value.copy()
    copy[way[0]] = replaced(value[way[0]], way[1:], new)
    return copy


def changed_anywhere(whole: Any, new: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[Any]:
    """Plain data of the right form in which up to two values are others."""
    ways = list(leaves(whole))

    def apply(changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
        result = whole
        for way, value in changes:
            try:
                result = replaced(result, way, value)
            except (KeyError, IndexError, TypeError, AttributeError):  # the first change took its place away
                continue
        return result

    return st.lists(st.tuples(st.sampled_from(ways), new), min_size=1, max_size=2).map(apply)


# --- config -----------------------------------------------------------------------------------------------------------

CONFIG = {
    "run_dir": "runs/x",
    "seed": 1,
    "model": {"name": "base", "quantization": "nf4", "compute_dtype": "float32"},
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"]},
    "data": {"train": [{"path": "a.json", "format": "text", "weight": 2.0, "hold_out": 0.1, "max_examples": 5}],
             "eval": [], "row_tokens": 64, "cache_dir": "cache", "on_long": "drop"},
    "batch": {"rows_per_step": 4, "micro_rows": 1},
    "optim": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1},
    "train": {"steps": 5, "save_every": 2, "keep": 2},
    "strategy": {"name": "ddp", "timeout_seconds": 600},
    "memory": {"recompute": "full"},
    "logging": {"trackers": []},
}  # fmt: skip
BOMB = (
    "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}]\n" for i in range(30)) + "run_dir: *a30\n"
)
YAML_TEXTS = st.one_of(
    changed_anywhere(CONFIG).map(yaml.safe_dump),
    st.sampled_from([BOMB, "a: &a [*a]", "!!int x", "!!timestamp 5", "d: 2024-99-99", "!!python/object:os.system x",
                     "? [a]\n: b", "9" * 5000, "[" * 2000, "a: 1\na: 2", "\0", "- x", "!!bool maybe", "x: !!binary ===",
                     "run_dir: \t"]),
    st.text(max_size=20),
)  # fmt: skip


@examples(70)
@given(YAML_TEXTS)
def test_a_config_of_any_form(text: str) -> None:
    with bounded() as folder:
        (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            load_config(folder / "config.yaml")
        except UserError as error:
            assert len(str(error)) < 10_000


KEYS = st.sampled_from(["data.train.0.path", "data.train.\u00b2.path", "optim.lr", "a..b", "lora"])


@examples(50)
@given(
    st.lists(
        st.tuples(st.one_of(TEXTS, KEYS),
                  st.one_of(TEXTS, DEEP, st.sampled_from(["!!int x", "&a [*a]", "{", "null", "2024-99-99"]))),
        min_size=1, max_size=2,
    )
)  # fmt: skip
def test_an_override_of_any_form(pairs: list[tuple[str, str]]) -> None:
    with bounded() as folder:
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        with suppress(UserError):
            load_config(folder / "config.yaml", tuple(f"{key}={value}" for key, value in pairs))


# --- data -------------------------------------------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]},
         {"role": "assistant", "content": "a", "tool_calls": [CALL], "reasoning_content": "r", "weight": 1},
         {"role": "tool", "tool_call_id": "1", "content": "t"}]  # fmt: skip
TREE = {"message_tree_id": "m", "prompt": {"text": "q", "role": "prompter", "replies": [
    {"text": "a", "role": "assistant", "rank": 0, "deleted": False, "replies": []}]}}  # fmt: skip
RECORDS: dict[str, Any] = {
    "messages": {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}],
        "system": "s",
    },
    "alpaca": {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "system": "s"},
    "oasst": TREE,
    "tokens": {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
    "text": {"text": "t"},
    "prompt-completion": {"prompt": TURNS[:2], "completion": [{"role": "assistant", "content": "a"}]},
    "self-instruct": {"instruction": "i", "instances": [{"input": "x", "output": "o"}]},
    "hh-rlhf": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": ""},
}


@examples(150)
@given(st.sampled_from(sorted(RECORDS)).flatmap(lambda name: st.tuples(st.just(name), changed_anywhere(RECORDS[name]))))
def test_a_record_of_any_inner_types(case: tuple[str, Any]) -> None:
    name, record = case
    with bounded():
        try:
            if isinstance(record, dict):
                detect_format(record, "data")
        except UserError:
            pass
        fields = record if isinstance(record, dict) else {"value": record}
        try:
            documents, unread = convert(name, RawRecord(fields, "data, line 1"), {})
            assert documents is not None and all(isinstance(key, str) for key in unread)
        except BadRecord as error:
            assert str(error)


@examples(100)
@given(st.sampled_from(sorted(FORMATS)), st.dictionaries(TEXTS, VALUES, max_size=3))
def test_a_record_of_another_format(name: str, fields: dict[str, Any]) -> None:
    with bounded(), suppress(BadRecord):
        convert(name, RawRecord(fields, "data, line 1"), {})


IDS = st.sampled_from(["a", "b", "c", None, 1, ["a"], {}])


@examples(100)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"message_id": IDS, "parent_id": IDS, "role": st.sampled_from(["prompter", "assistant", 5]),
             "text": st.sampled_from(["x", 5, None])},
            optional={"rank": VALUES, "deleted": VALUES, "replies": VALUES},
        ),
        max_size=5,
    )
)  # fmt: skip
def test_messages_that_answer_each_other_in_any_way(flat: list[dict[str, Any]]) -> None:
    with bounded():
        raws = (RawRecord(fields, f"data, line {i}") for i, fields in enumerate(flat))
        for raw in group_records("oasst", raws):
            with suppress(BadRecord):
                convert("oasst", raw, {})


def _csv(rows: list[list[str]]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


FILES = st.one_of(
    st.tuples(st.just(".jsonl"), st.lists(BYTES, max_size=3).map(b"\n".join)),
    st.tuples(st.just(".json"), st.lists(BYTES, max_size=3).map(lambda some: b"[" + b",".join(some) + b"]")),
    st.tuples(st.just(".json"), BYTES),
    st.tuples(st.sampled_from([".csv", ".tsv"]), st.lists(st.lists(TEXTS, max_size=3), max_size=4).map(_csv)),
    st.tuples(st.sampled_from([".txt", ".parquet", ".arrow", ".csv"]), st.one_of(st.binary(max_size=60), BYTES)),
    st.tuples(st.just(".parquet"), st.binary(max_size=30).map(lambda some: b"PAR1" + some + b"PAR1")),
)


@examples(120)
@given(FILES)
def test_a_data_file_of_any_content(file: tuple[str, bytes]) -> None:
    suffix, content = file
    with bounded() as folder:
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        try:
            for raw in read_file(path):
                assert (raw.fields is None) == (raw.problem is not None) and str(path) in raw.where
        except UserError as error:
            assert str(path) in str(error)


# --- models and adapters ----------------------------------------------------------------------------------------------

ENTRY = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
         "b": {"dtype": "U8", "shape": [4], "data_offsets": [16, 20]}}  # fmt: skip


@examples(200)
@given(
    st.one_of(changed_anywhere(ENTRY, st.one_of(VALUES, st.integers(0, 30))).map(as_json), JSON_TEXTS),
    st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    st.integers(0, 24),
)
def test_a_safetensors_header_of_any_form(header: str, length: int | None, num_bytes: int) -> None:
    text = header.encode("utf-8", "surrogatepass")
    content = (len(text) if length is None else length).to_bytes(8, "little") + text + b"\1" * num_bytes
    with bounded() as folder:
        path = folder / "model.safetensors"
        path.write_bytes(content)
        try:
            files = WeightFiles([path])
        except BadFile as error:
            assert str(path) in str(error)
            return
        for name in files.entries:
            files.read(name)


@examples(100)
@given(
    st.one_of(
        changed_anywhere({"metadata": {"total_size": 5}, "weight_map": {"a": "b.safetensors"}}).map(as_json), JSON_TEXTS
    )
)
def test_an_index_of_any_form(text: str) -> None:
    with bounded() as folder:
        path = folder / "model.safetensors.index.json"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            _check_index(path)
        except BadFile as error:
            assert str(path) in str(error)


MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "head_dim": 16,
         "rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_parameters": {"rope_type": "default"}, "torch_dtype": "float32",
         "max_position_embeddings": 64, "tie_word_embeddings": False, "layer_types": ["full_attention"] * 2,
         "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "text_config": {}}  # fmt: skip


@examples(150)
@given(st.one_of(changed_anywhere(MODEL).map(as_json), JSON_TEXTS))
def test_a_model_config_of_any_form(text: str) -> None:
    with bounded() as folder:
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            shapes_from_config(read_config_json(str(folder)))
        except UserError as error:
            assert str(folder) in str(error) or "config.json" in str(error)


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"],
           "bias": "none", "use_rslora": False, "use_dora": False, "init_lora_weights": True, "task_type": "CAUSAL_LM",
           "revision": None, "rank_pattern": {}, "modules_to_save": None, "base_model_name_or_path": "b"}  # fmt: skip


@examples(200)
@given(st.one_of(changed_anywhere(ADAPTER).map(as_json), JSON_TEXTS))
def test_an_adapter_config_of_any_form(text: str) -> None:
    with bounded() as folder:
        (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            config = read_adapter_config(folder)
            assert config.r >= 1
        except UserError as error:
            assert str(folder) in str(error)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a checkpoint by name."""

    def write_weights(folder: Path) -> None:
        save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")

    state = {"num_tokens": 5, "num_labels": 4, "config": "seed: 1\n", "data_fingerprint": "f", "layout": [["a", 2]],
             "optimizer_numbers": {"0.step": 1.0}, "sources": {"model.name": {"config.json": "d"}}}  # fmt: skip
    folder = save_checkpoint(
        tmp_path_factory.mktemp("run"), 1, write_weights=write_weights, optimizer_tensors={"m": torch.zeros(2)},
        state=state, keep=1,
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@examples(100)
@given(st.data())
def test_a_checkpoint_of_any_content_is_taken_or_rejected(checkpoint: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["manifest.json", "state.json", "both"]))
    changed = dict(checkpoint)
    if name != "state.json":
        whole = json.loads(checkpoint["manifest.json"])
        changed["manifest.json"] = data.draw(
            st.one_of(changed_anywhere(whole).map(lambda one: as_json(one).encode()), BYTES)
        )
    if name != "manifest.json":
        whole = json.loads(checkpoint["state.json"])
        changed["state.json"] = data.draw(
            st.one_of(changed_anywhere(whole).map(lambda one: as_json(one).encode()), BYTES)
        )
        if name == "state.json":  # signed by whoever wrote it
            manifest = json.loads(checkpoint["manifest.json"])
            digest = hashlib.sha256(changed["state.json"]).hexdigest()
            manifest["files"]["state.json"] = {"bytes": len(changed["state.json"]), "sha256": digest}
            changed["manifest.json"] = as_json(manifest).encode()
    with bounded() as folder:
        target = folder / "step-00000001"
        target.mkdir()
        for file, content in changed.items():
            (target / file).write_bytes(content)
        found, rejected = find_newest(folder)
        assert (found is None) == (len(rejected) == 1)


@examples(35)
@given(st.one_of(YAML_TEXTS, st.sampled_from([BOMB])))
def test_the_config_of_a_run_of_any_form(text: str) -> None:
    current = yaml.safe_dump(CONFIG)
    with bounded() as folder:
        (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        run = RunDir(folder)
        run.saved_fields()
        with suppress(UserError):
            run.open(current)
        with suppress(UserError):
            config_changes(text, current)


@examples(150)
@given(st.lists(BYTES, max_size=3).map(b"\n".join), BYTES)
def test_what_a_run_leaves_of_any_form(lines: bytes, content: bytes) -> None:
    with bounded() as folder:
        run = RunDir(folder)
        for path in (run.metrics, run.completed, run.summary, folder / "outcome.json", folder / "prompt_format.json"):
            path.write_bytes(lines if path == run.metrics else content)
        for values in read_metrics(run.metrics):
            assert isinstance(values["step"], int)
        run.completed_steps({"steps": 5})
        read_outcome(folder / "outcome.json")
        try:
            PromptFormat.read(folder)
        except UserError as error:
            assert "prompt_format.json" in str(error)


def test_the_right_values_are_accepted(tmp_path: Path, checkpoint: dict[str, bytes]) -> None:
    """The guard: what the tests above spoil is right before."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    load_config(tmp_path / "config.yaml")
    for name, record in RECORDS.items():
        documents, _ = convert(name, RawRecord(record, "data, line 1"), {})
        assert documents
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "quantization_config": None, "text_config": None}))
    assert shapes_from_config(read_config_json(str(tmp_path))) is not None
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert read_adapter_config(tmp_path).r == 4
    (tmp_path / "step-00000001").mkdir()
    for file, content in checkpoint.items():
        (tmp_path / "step-00000001" / file).write_bytes(content)
    assert find_newest(tmp_path) == (tmp_path / "step-00000001", [])
