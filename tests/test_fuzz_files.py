"""Models, adapters and a run's own files of any content: as test_fuzz says of configs and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzz import (
    CONFIG,
    FULL,
    YAML,
    altered,
    ends,
    examples,
    mutated,
    shared_folder,
    write,
)
from helpers.tiny_models import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from qlora_dist.commands.supervise.exit_report import read_outcome
from qlora_dist.config import parse_config
from qlora_dist.config.changes import config_changes
from qlora_dist.config.reading import dump_yaml
from qlora_dist.config.run_dir import RunDir, num_damaged_metrics, read_metrics
from qlora_dist.errors import MachineFailed, RunFailed, UserError
from qlora_dist.memory import plan_memory
from qlora_dist.memory.read_shapes import read_shapes
from qlora_dist.model.lora_files import read_adapter, read_adapter_config
from qlora_dist.model.weights.safetensors_files import BadFile, WeightFiles
from qlora_dist.model.weights.sources import open_files
from qlora_dist.train.checkpoint import find_newest, save_checkpoint
from qlora_dist.train.metrics import median_tokens_per_second

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
    path = write(shared_folder(tmp_path_factory, "weights") / "model.safetensors", content)
    files: WeightFiles | None = ends(lambda: WeightFiles([path]), BadFile)
    if files is not None:
        for name in files.entries:
            ends(lambda name=name: files.read(name), BadFile)


@examples(50)
@given(text=altered({"metadata": {"total_size": 16}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
def test_an_index_of_any_content_is_read_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = shared_folder(tmp_path_factory, "index")
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
    folder = shared_folder(tmp_path_factory, "model")
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

    folder = shared_folder(tmp_path_factory, "adapter")
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
    path = write(shared_folder(tmp_path_factory, "metrics") / "metrics.jsonl", "\n".join(lines) + end)
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
