"""A base that its config calls tied, with an output head of its own in the files: trained, exported and merged as two
matrices, as stock transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks
from helpers.tiny_run import changed, config_of, losses_of, make_inputs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_dist.commands.merge import merge
from qlora_dist.train import train

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    """The tiny base has two matrices; the config is changed to say that they are one."""
    raw = changed(make_inputs(tmp_path), model__quantization="none", train__steps=2)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert not torch.equal(weights[EMBEDDING], weights[HEAD])
    return raw


def _train(raw: dict[str, Any]) -> int:
    return train(config_of(raw)).step


def _reloaded(folder: Path) -> dict[str, torch.Tensor]:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    return model.state_dict()


def test_an_adapter_is_trained_on_both_and_merged_into_both(inputs: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "model"
    untied = changed(inputs, run_dir=str(tmp_path / "untied"), model__name=str(tmp_path / "said"))
    (tmp_path / "said").mkdir()
    for path in base.iterdir():
        (tmp_path / "said" / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "said" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    for raw in (inputs, untied):
        _train(raw)
    assert losses_of(inputs["run_dir"]) == losses_of(untied["run_dir"])  # as with a config that tells the truth
    merge(inputs["run_dir"], tmp_path / "merged", dtype=torch.float32)
    merged, weights = _reloaded(tmp_path / "merged"), load_file(base / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(merged[name], weights[name])


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_full_fine_tuning_moves_and_exports_both(inputs: dict[str, Any], tmp_path: Path, strategy: str) -> None:
    on_ranks(_train, 2, changed(inputs, lora=None, strategy__name=strategy))
    exported, weights = _reloaded(tmp_path / "run" / "model"), load_file(tmp_path / "model" / "model.safetensors")
    assert not torch.equal(exported[EMBEDDING], exported[HEAD])
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "weights.safetensors")
    for name in (EMBEDDING, HEAD):
        assert not torch.equal(exported[name], weights[name]) and torch.equal(exported[name], saved[name])


def test_a_head_that_equals_the_embedding_is_one_matrix_with_it(inputs: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, HEAD: weights[EMBEDDING].clone()}, path, metadata={"format": "pt"})
    _train(changed(inputs, lora=None))
    exported = _reloaded(tmp_path / "run" / "model")
    assert torch.equal(exported[EMBEDDING], exported[HEAD]) and not torch.equal(exported[HEAD], weights[EMBEDDING])
