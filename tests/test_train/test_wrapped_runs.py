"""Runs on the text model of a wrapper: ranks, strategies, the 4-bit copy, and the merged wrapper."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks
from helpers.tiny_models import OTHER_TOWERS, tiny_tokenizer, tiny_wrapper
from helpers.tiny_run import changed, config_of, losses_of, make_inputs
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from qlora_dist.commands.merge import merge
from qlora_dist.model import INFERENCE, load_base
from qlora_dist.model.lora import load_adapters
from qlora_dist.train import train

INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[5, 9, 30, 7, 61, 12]])


def _inputs(folder: Path, family: str) -> dict[str, Any]:
    raw = make_inputs(folder)
    shutil.rmtree(folder / "model")
    tiny_wrapper(family).save_pretrained(folder / "model", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model/preprocessor_config.json").write_text('{"size": 16}')
    return raw


def _train(raw: dict[str, Any], **changes: Any) -> None:
    train(config_of(raw, **changes))


@pytest.fixture(scope="module", params=["gemma3", "qwen2_5_vl"])
def trained(request: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """A run of one process."""
    raw = _inputs(tmp_path_factory.mktemp("wrapper"), request.param)
    _train(raw)
    return raw


@torch.no_grad()
def _trained_logits(raw: dict[str, Any]) -> torch.Tensor:
    settings = {"double_quant": True, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    base = load_base(raw["model"]["name"], quantization="nf4", attention=INFERENCE, **settings)
    return load_adapters(base, {"one": Path(raw["run_dir"]) / "adapter"})(IDS).logits


@torch.no_grad()
def test_the_loss_falls_and_the_adapter_of_the_run_loads_in_the_stock_wrapper(trained: dict[str, Any]) -> None:
    losses = losses_of(trained["run_dir"])
    assert losses[-1] < losses[0] - 0.1
    folder, name = Path(trained["run_dir"]) / "adapter", trained["model"]["name"]
    settings = {"double_quant": True, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    base = load_base(name, quantization="none", attention=INFERENCE, **settings)
    stock = AutoModelForMultimodalLM.from_pretrained(name, dtype=torch.float32)
    plain = stock(input_ids=IDS).logits
    theirs = PeftModel.from_pretrained(stock, str(folder)).eval()(input_ids=IDS).logits
    torch.testing.assert_close(load_adapters(base, {"one": folder})(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - plain).abs().max() > 0.01


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(trained: dict[str, Any], strategy: str, tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    on_ranks(_train, 2, changed(trained, run_dir=run_dir, strategy__name=strategy), timeout=240)
    assert losses_of(run_dir) == pytest.approx(losses_of(trained["run_dir"]), abs=1e-5)
    found, expected = (
        load_file(Path(run) / "adapter/adapter_model.safetensors") for run in (run_dir, trained["run_dir"])
    )
    assert found.keys() == expected.keys() and all("model.language_model.layers" in key for key in found)


def test_the_4_bit_copy_trains_the_same_adapter(trained: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "qlora_dist"):
        _train(trained, run_dir=str(tmp_path / "run"), model__cache_4bit=str(tmp_path / "copies"))
    assert losses_of(tmp_path / "run") == losses_of(trained["run_dir"])
    left, right = (
        load_file(Path(run) / "adapter/adapter_model.safetensors") for run in (tmp_path / "run", trained["run_dir"])
    )
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert any("are left out: text only" in record.getMessage() for record in caplog.records)


@torch.no_grad()
def test_the_merged_wrapper_is_what_was_trained_and_keeps_the_other_towers(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    report = merge(trained["run_dir"], tmp_path / "out", onto="dequantized", dtype=torch.float32)
    assert report.gaps["dequantized"] <= 1e-4 * report.logit_range
    assert report.gaps["base"] > 100 * report.gaps["dequantized"]
    merged = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, _trained_logits(trained), atol=5e-5, rtol=1e-5)
    base = Path(trained["model"]["name"])
    files = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert len(files) > 1 and files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    num_equal = 0
    for file in files:
        before, after = load_file(base / file), load_file(tmp_path / "out" / file)
        assert before.keys() == after.keys()
        for key, value in before.items():
            is_changed = not torch.equal(value, after[key])
            assert is_changed == ("_proj.weight" in key and not any(tower in key for tower in OTHER_TOWERS)), key
            num_equal += not is_changed
    assert num_equal > 20
    now, before = (
        [json.loads((folder / name).read_text()) for name in ("preprocessor_config.json", "config.json", INDEX)]
        for folder in (tmp_path / "out", base)
    )
    assert now[0] == before[0] and now[1]["architectures"] == before[1]["architectures"]
    assert now[2]["weight_map"] == before[2]["weight_map"]
    assert now[2]["metadata"]["total_size"] == before[2]["metadata"]["total_size"]


def test_the_rest_of_a_wrapper_keeps_its_type_where_the_text_model_is_rounded(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    merge(trained["run_dir"], tmp_path / "out", dtype=torch.bfloat16, compare=False)
    weights = {
        key: value for path in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(path).items()
    }
    kinds = {(any(tower in key for tower in OTHER_TOWERS), value.dtype) for key, value in weights.items()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@torch.no_grad()
def test_text_only_writes_the_stock_text_class(trained: dict[str, Any], tmp_path: Path) -> None:
    merge(trained["run_dir"], tmp_path / "out", onto="dequantized", dtype=torch.float32, compare=False, text_only=True)
    weights = load_file(tmp_path / "out/model.safetensors")
    assert all(key.startswith(("model.layers", "model.embed_tokens", "model.norm", "lm_head")) for key in weights)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(IDS).logits, _trained_logits(trained), atol=5e-5, rtol=1e-5)
