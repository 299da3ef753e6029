"""Files and options of any content: a result or the documented error, in bounded time and memory. Never another error.

The examples are drawn anew by each change of a strategy, but are the same in every run.
"""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_dist.commands.supervise.exit_report import read_outcome
from qlora_dist.config import RunConfig, load_config, parse_config
from qlora_dist.config.reading import dump_yaml, parse_yaml
from qlora_dist.config.run_dir import RunDir, config_changes, num_damaged_metrics, read_metrics
from qlora_dist.data.formats import FORMATS, BadRecord, RawRecord, convert, detect_format, group_records, read_file
from qlora_dist.errors import MachineFailed, RunFailed, UserError
from qlora_dist.memory import plan_memory
from qlora_dist.memory.read_shapes import read_shapes
from qlora_dist.model.lora_files import read_adapter, read_adapter_config
from qlora_dist.model.weights.safetensors_files import BadFile, WeightFiles
from qlora_dist.model.weights.sources import open_files
from qlora_dist.train.checkpoint import find_newest, save_checkpoint
from qlora_dist.train.metrics import median_tokens_per_second

SECONDS, BYTES = 2.0, 2**29  # of one example: its processor time, and what it adds to the process


class OutOfBounds(BaseException):
    """Not an Exception: no handler may mistake it for an error of the input."""


@contextmanager
def bounded() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfBounds(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, handler)


def ends(act: Callable[[], Any], *allowed: type[Exception]) -> Any:
    """What `act` gives, None after one of the `allowed` errors, each of which must say something, and not a novel."""
    with bounded():
        try:
            return act()
        except allowed as error:
            assert 0 < len(str(error)) < 10_000
            return None


def examples(number: int) -> settings:
    return settings(
        max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


# --- values of any kind -----------------------------------------------------------------------------------------------

# a list of odd values finds more in a second than values drawn from nothing
ODD_TEXTS = [
    "", "a", "auto", "none", "nan", "1e999", "7", "../x", "~nobody", "a\0b", "\ud800", "\x1b[2J", "2024-99-99",
    "é" * 3000,
]  # fmt: skip
ODD = [
    None, True, False, 0, 1, 2, 7, -1, 2**31, 2**63 - 1, 2**63, 10**30, 10**400, 0.5, -0.0, 1e300, 5e-324, float("nan"),
    float("inf"), *ODD_TEXTS, [], [[]], [1], ["a"], [None], [-1, 0.5], {}, {"": {}}, {"a": 1}, {"a": ["b"]},
    [{"a": None}],
]  # fmt: skip
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(max_size=6)
LEAVES = st.sampled_from(ODD)
VALUES = st.one_of(
    LEAVES, LEAVES, st.lists(LEAVES, max_size=3), st.dictionaries(st.sampled_from(ODD_TEXTS), LEAVES, max_size=2)
)
DEEP = "[" * 100_000


def objects(keys: list[str], values: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these keys, and sometimes another."""
    return st.dictionaries(st.sampled_from(keys) | TEXTS, values, max_size=len(keys))


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with a few bytes replaced, inserted or removed, or cut off."""
    edits = st.tuples(st.integers(0, len(content)), st.integers(0, 3), st.binary(max_size=3))

    def apply(changes: list[tuple[int, int, bytes]], end: int) -> bytes:
        now = content
        for at, gone, new in changes:
            now = now[:at] + new + now[at + gone :]
        return now[:end]

    ends_at = st.just(len(content) + 99) | st.integers(0, len(content))
    return st.builds(apply, st.lists(edits, max_size=4), ends_at)


def json_text(value: Any) -> str:
    """JSON of a value, with what Python's own encoder refuses to print."""
    try:
        return json.dumps(value)
    except ValueError:  # integers of thousands of digits
        return "9" * 5000


def altered(good: Any, values: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[str]:
    """JSON of an object with a few of its values, at any depth, replaced or removed; or of something else."""
    places = list(_places(good))
    changes = st.lists(st.tuples(st.sampled_from(places), values, st.integers(0, 4)), min_size=1, max_size=3)

    def apply(chosen: list[tuple[tuple[Any, ...], Any, int]]) -> str:
        copy = json.loads(json.dumps(good))
        for (*way, last), value, dice in chosen:
            node = copy
            try:
                for part in way:
                    node = node[part]
                if dice == 0 and isinstance(node, dict):
                    node.pop(last, None)
                else:
                    node[last] = value
            except (KeyError, IndexError, TypeError):  # another change has removed it
                continue
        return json_text(copy)

    text = json.dumps(good)
    other = st.one_of(VALUES.map(json_text), st.sampled_from(["", DEEP, "{", '{"a":' * 2000, "9" * 6000, "\x00"]))
    cut = st.integers(0, len(text)).map(lambda end: text[:end])
    return st.one_of(st.builds(apply, changes), st.builds(apply, changes), st.builds(apply, changes), other, cut)


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*way, key)
        yield from _places(inner, (*way, key))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


# --- config -----------------------------------------------------------------------------------------------------------

CONFIG = {
    "run_dir": "runs/x",
    "model": {"name": "m", "compute_dtype": "float32"},
    "data": {"train": [{"path": "d.json", "columns": {"input": "a"}}], "eval": [{"path": "e.json"}]},
    "train": {"steps": 5},
}
FULL = json.loads(parse_config(CONFIG).model_dump_json())
YAML = st.lists(
    st.sampled_from(
        [*" \n\t:-?,[]{}&*!|>%@`\"'#=.0123456789eE+~", "  ", "\n- ", ": ", "run_dir", "model", "data", "train", "path",
         "&a ", "*a", "<<: ", "!!int ", "!!float ", "!!bool ", "!!binary ", "!!timestamp ", "!!set ", "!!omap ",
         "!!python/object:os.system ", "2024-99-99", "0x", "1e999", ".inf", ".nan", "0o9", "1:99", "null", "true",
         "\ud800", "\x00", "---", "...", "%YAML 1.2", "é", "\u2028"]
    ),
    max_size=25,
).map("".join)  # fmt: skip


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
    path = write(_folder(tmp_path_factory, "config") / "c.yaml", text)
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


KEYS = [".".join(map(str, place)) for place in _places(FULL)]
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
    path = write(_folder(tmp_path_factory, "set") / "c.yaml", json.dumps(CONFIG))
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
    path = write(_folder(tmp_path_factory, "data") / f"d{content[0]}", content[1])
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


# --- models and adapters ----------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
HEADER = {"__metadata__": {"format": "pt"}, "a": ENTRY, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [8, 16]}}


def _weights(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + b"\0" * 16


@examples(80)
@given(
    content=st.one_of(
        altered(HEADER).map(lambda text: _weights(text.encode("utf-8", "surrogatepass"))),
        st.builds(_weights, st.binary(max_size=20), st.sampled_from([None, 0, 2**63, 2**27])),
        mutated(_weights(json.dumps(HEADER).encode())),
    )
)
def test_a_weight_file_of_any_content_is_read_or_refused(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(_folder(tmp_path_factory, "weights") / "model.safetensors", content)
    files: WeightFiles | None = ends(lambda: WeightFiles([path]), BadFile)
    if files is not None:
        for name in files.entries:
            ends(lambda name=name: files.read(name), BadFile)


@examples(50)
@given(text=altered({"metadata": {"total_size": 16}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
def test_an_index_of_any_content_is_read_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = _folder(tmp_path_factory, "index")
    write(folder / "config.json", "{}")
    write(folder / "x.safetensors", _weights(json.dumps(HEADER).encode()))
    write(folder / "model.safetensors.index.json", text)
    ends(lambda: open_files(str(folder)), UserError)


# not all of the many keys: most have no part in a plan
SIZES = {
    "model_type", "hidden_size", "n_embd", "intermediate_size", "n_inner", "num_hidden_layers", "n_layer", "vocab_size",
    "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_parameters",
    "partial_rotary_factor", "rotary_pct", "n_positions", "layer_types", "attention_bias", "quantization_config",
}  # fmt: skip


def _model_json(family: str) -> dict[str, Any]:
    return {key: value for key, value in tiny_config(family).to_dict().items() if key in SIZES}


@examples(150)
@given(text=st.sampled_from(["llama", "gpt2", "phi3", "gpt_neox"]).flatmap(lambda name: altered(_model_json(name))))
def test_a_config_json_of_any_values_is_planned_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = _folder(tmp_path_factory, "model")
    write(folder / "config.json", text)
    config = parse_config(CONFIG)
    shapes = ends(lambda: read_shapes(str(folder)), UserError)
    if shapes is not None:
        plan = ends(lambda: plan_memory(config, shapes, world_size=1, device_bytes=None), UserError)
        assert plan is None or plan.peak_bytes > 0


ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"], "bias": "none",
    "use_rslora": False, "use_dora": False, "base_model_name_or_path": "m", "revision": None, "rank_pattern": {},
    "layers_to_transform": None, "modules_to_save": None, "init_lora_weights": True, "fan_in_fan_out": False,
}  # fmt: skip


@examples(80)
@given(text=altered(ADAPTER))
def test_an_adapter_config_of_any_values_is_read_or_refused(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import torch
    from safetensors.torch import save_file

    folder = _folder(tmp_path_factory, "adapter")
    if not (folder / "adapter_model.safetensors").exists():
        keys = [f"base_model.model.q_proj.lora_{kind}.weight" for kind in "AB"]
        save_file(dict(zip(keys, (torch.ones(2, 3), torch.ones(3, 2)))), folder / "adapter_model.safetensors")
    write(folder / "adapter_config.json", text)
    ends(lambda: read_adapter_config(folder), UserError)
    ends(lambda: read_adapter(folder), UserError)


# --- a run's own files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with one checkpoint, and what its JSON files hold."""
    import torch

    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    numbers = {"num_tokens": 5, "num_labels": 4, "optimizer_numbers": {"t": 1}, "sources": {"a": {"b": 1}}}
    path = save_checkpoint(
        folder,
        5,
        write_weights=lambda aside: write(aside / "weights.safetensors", _weights(json.dumps(HEADER).encode())),
        optimizer_tensors={"m": torch.zeros(2)},
        state={**numbers, "config": "run_dir: x", "data_fingerprint": "x", "layout": [["a", 1]]},
        keep=1,
    )
    return path, {name: json.loads((path / name).read_text()) for name in ("manifest.json", "state.json")}


@examples(80)
@given(data=st.data())
def test_a_checkpoint_of_any_content_is_whole_or_rejected(
    data: st.DataObject, checkpoints: tuple[Path, dict[str, Any]]
) -> None:
    path, good = checkpoints
    name = data.draw(st.sampled_from(sorted(good)))
    for other in good:
        write(path / other, json.dumps(good[other]))
    write(path / name, data.draw(altered(good[name])))
    newest, rejected = ends(lambda: find_newest(path.parent))
    assert (newest is None) == bool(rejected)


CURRENT = dump_yaml(parse_config(CONFIG))
METRIC = {"step": 3, "loss": 1.5, "tokens_per_second": 10.0, "eval_loss": 2.0}


@examples(60)
@given(lines=st.lists(altered(METRIC) | st.just(json.dumps(METRIC)), max_size=3), end=st.sampled_from(["", "\n"]))
def test_metrics_of_any_lines_are_read_line_by_line(
    lines: list[str], end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(_folder(tmp_path_factory, "metrics") / "metrics.jsonl", "\n".join(lines) + end)
    found = ends(lambda: list(read_metrics(path)))
    assert len(found) >= sum(line == json.dumps(METRIC) for line in lines)
    assert all(type(values["step"]) is int for values in found)
    ends(lambda: num_damaged_metrics(path))
    ends(lambda: median_tokens_per_second(path))


@examples(40)
@given(
    texts=st.fixed_dictionaries(
        {},
        optional={
            "config.yaml": YAML | altered(FULL),
            "completed": altered({"step": 5, "length": {"steps": 5, "epochs": None}}),
            "outcome": altered({"kind": "failed", "step": 5, "signal": None, "text": "x"}),
            "checkpoints/step-00000005/state.json": altered({"config": "run_dir: x"}),
            "metrics.jsonl": altered(METRIC),
        },
    )
)
def test_a_run_directory_of_any_content_is_continued_or_refused(
    texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run")
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        write(path / name, text)
    run, current = RunDir(path), CURRENT
    steps = ends(lambda: run.completed_steps({"steps": 5, "epochs": None}))
    assert steps is None or type(steps) is int
    ends(run.newest_step)
    ends(run.saved_fields)
    ends(lambda: read_outcome(path / "outcome"))
    if "config.yaml" in texts:
        text = (path / "config.yaml").read_bytes().decode(errors="replace")
        ends(lambda: config_changes(text, current), UserError)
    ends(lambda: run.open(current), UserError, RunFailed, MachineFailed)


def _folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """The same folder for all examples of a test."""
    folder = factory.getbasetemp() / f"fuzz-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def test_the_bounds_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin() -> None:
        while True:
            pass

    with pytest.raises(MemoryError):
        ends(lambda: bytearray(2 * BYTES), UserError)
    monkeypatch.setattr(f"{__name__}.SECONDS", 0.05)
    with pytest.raises(OutOfBounds):
        ends(spin, Exception)
