"""Merging: the arithmetic, what the files are, what is measured, what is refused."""

from __future__ import annotations

import errno
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from helpers.decoded import save_fp8, save_mxfp4
from helpers.tiny_models import random_batch, save_model, tiny_model
from helpers.tiny_run import changed, make_inputs
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_dist.commands.merge import describe, merge
from qlora_dist.errors import MachineFailed, UserError
from qlora_dist.model import INFERENCE, load_base
from qlora_dist.model.lora import attach_lora, load_adapters, trainable_parameters
from qlora_dist.model.lora_files import save_adapter

CPU = torch.device("cpu")
merge_module = sys.modules[merge.__module__]  # `commands.merge` is the command
IDS = random_batch((12,)).input_ids


def make_run(
    folder: Path, family: str = "llama", variant: Any = "lora", quantization: str = "nf4", strength: float = 0.05
) -> Path:
    """A run directory with an adapter that changes much, on a tiny base in fp32, or of files that are decoded."""
    raw = make_inputs(folder)
    if family in ("fp8", "mxfp4"):
        (save_fp8 if family == "fp8" else save_mxfp4)(folder / "model")
    else:
        save_model(folder / "model", tiny_model(family, attention=None))
    raw = changed(raw, model__quantization=quantization, lora__variant=variant)
    run = Path(raw["run_dir"])
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    model = attach_lora(quantized(folder / "model", quantization, "auto"), rank=4, alpha=8, variant=variant)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * strength)
            if "magnitude" in name:
                parameter.mul_(1.1)
    save_adapter(model, run / "adapter", str(folder / "model"))
    return run


def quantized(folder: Path, quantization: Any = "nf4", attention: str = INFERENCE) -> Any:
    return load_base(
        str(folder),
        quantization=quantization,
        double_quant=True,
        compute_dtype=torch.float32,
        attention=attention,
        device=CPU,
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits[0].float()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_merged_onto_the_dequantized_base_equals_the_trained_model(family: str, variant: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, family, variant)
    report = merge(run, tmp_path / "out", onto="dequantized", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    trained = load_adapters(quantized(tmp_path / "model"), {"a": run / "adapter"})
    expected = logits(trained)
    # fp32: two matrix products against one; logits reach several units, and processors sum in different orders
    torch.testing.assert_close(logits(merged), expected, atol=5e-5, rtol=1e-5)
    assert report.gaps["dequantized"] < 1e-4 < report.gaps["base"]
    with trained.disable_adapter():
        assert (logits(trained) - expected).abs().max() > 0.1  # the guard: the adapter matters


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_merged_onto_the_base_equals_original_weights_plus_adapter(variant: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, variant=variant)
    merge(run, tmp_path / "out", onto="base", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    original = load_adapters(plain, {"a": run / "adapter"})
    torch.testing.assert_close(logits(merged), logits(original), atol=5e-5, rtol=1e-5)  # fp32, as above


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_a_base_of_fp8_or_mxfp4_is_written_decoded_and_that_is_said(form: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, form)
    trained = logits(load_adapters(quantized(tmp_path / "model"), {"a": run / "adapter"}))
    # decoded by transformers, which leaves in bf16 what was not fp8
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).float()
    original = logits(load_adapters(plain, {"a": run / "adapter"}))
    assert (trained - original).abs().max() > 0.1
    for onto, expected in (("dequantized", trained), ("base", original)):
        report = merge(run, tmp_path / onto, onto=onto, dtype=torch.float32, compare=False)  # type: ignore[arg-type]
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / onto, dtype=torch.float32)
        torch.testing.assert_close(logits(merged), expected, atol=5e-5, rtol=1e-5)  # fp32, as above
        assert f"the base's files are {form}, these are decoded: float32" in describe(report)
        assert "quantization_config" not in json.loads((tmp_path / onto / "config.json").read_text())
    merge(run, tmp_path / "out", onto="base", compare=False)
    files = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert {value.dtype for tensors in files for value in tensors.values()} == {torch.bfloat16}


def test_sixteen_bit_weights_are_rounded_once_from_fp32(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    merge(run, tmp_path / "exact", onto="base", dtype=torch.float32)
    merge(run, tmp_path / "out", onto="base")
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "out"))
    assert exact.keys() == rounded.keys()
    for key, value in exact.items():
        assert rounded[key].dtype == torch.bfloat16
        assert torch.equal(rounded[key], value.to(torch.bfloat16)), key


def test_the_result_is_an_ordinary_model_with_its_tokenizer_in_shards(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    merge(run, tmp_path / "out", max_shard_size="100KB")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len([name for name in names if name.startswith("model-0")]) > 1
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "LlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("w5", add_special_tokens=False) == [5]
    assert [path.name for path in tmp_path.iterdir() if "incomplete" in path.name] == []


def test_the_report_names_the_nearer_target(tmp_path: Path) -> None:
    run = make_run(tmp_path, strength=0.01)
    report = merge(run, tmp_path / "out", onto="base", dtype=torch.float32)
    assert describe(report).endswith("dequantized is closer to what was trained")
    assert report.gaps["base"] > 0.1 and report.logit_range > report.gaps["base"]
    assert list(merge(run, tmp_path / "two", onto="base", compare=False).gaps) == ["base"]


def test_auto_merges_onto_what_was_trained_and_measures_both_where_that_is_cheap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, strength=0.01)
    report = merge(run, tmp_path / "out", dtype=torch.float32)
    assert report.onto == "dequantized" and report.gaps["dequantized"] < report.gaps["base"]
    assert "merged onto dequantized, the nearer to what was trained; its" in describe(report)
    assert describe(report).endswith(f"onto base it would be {report.gaps['base']:.4g}")
    monkeypatch.setattr(merge_module, "CHEAP_WEIGHTS", 1000)
    large = merge(run, tmp_path / "large", dtype=torch.float32)
    assert list(large.gaps) == ["dequantized"]
    assert "merged onto dequantized, the weights that it was trained on; its" in describe(large)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "large"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert list(merge(run, tmp_path / "asked", compare=True).gaps) == ["base", "dequantized"]


def test_auto_takes_what_is_measured_to_be_nearer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    gaps = iter([0.1, 0.2])  # base, dequantized
    monkeypatch.setattr(merge_module, "_gap", lambda *_: next(gaps))
    report = merge(run, tmp_path / "out", dtype=torch.float32)
    assert report.onto == "base" and report.gaps == {"base": 0.1, "dequantized": 0.2}
    monkeypatch.undo()
    merge(run, tmp_path / "base", onto="base", dtype=torch.float32)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_adapter_that_does_not_tell_what_it_was_trained_on_is_merged_as_the_user_says(tmp_path: Path) -> None:
    (make_run(tmp_path) / "adapter").rename(tmp_path / "alone")
    with pytest.raises(UserError, match=r"alone: this adapter belongs to no run.* --onto dequantized .* --onto base"):
        merge(tmp_path / "alone", tmp_path / "out")
    report = merge(tmp_path / "alone", tmp_path / "out", onto="base", dtype=torch.float32)
    assert "differ from those of the adapter on the base in nf4 by up to" in describe(report)
    assert "was trained" not in describe(report)


def test_a_base_without_quantization_merges_to_the_trained_model(tmp_path: Path) -> None:
    run = make_run(tmp_path, quantization="none")
    report = merge(run, tmp_path / "out", dtype=torch.float32)
    assert report.onto == "base" and list(report.gaps) == ["base"] and report.gaps["base"] < 1e-4
    both = merge(run, tmp_path / "two", dtype=torch.float32, compare=True).gaps
    assert both["base"] == both["dequantized"] == report.gaps["base"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
)
def test_a_merge_on_a_full_disk_says_so_and_leaves_nothing_behind(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    with monkeypatch.context() as full:
        full.setattr("qlora_dist.model.weights.write_model.write_tensors", Mock(side_effect=error))
        with pytest.raises(MachineFailed, match=r"writing .*out: No space left on device.*free space.*No part of"):
            merge(run, tmp_path / "out", compare=False)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if "incomplete" in path.name] == []
    merge(run, tmp_path / "out", compare=False)  # the same command, once there is space


@pytest.mark.parametrize("gap", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_a_merge_before_it_writes(
    gap: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "_gap", lambda *_: gap)
    with pytest.raises(UserError, match="are not finite, though all weights are"):
        merge(make_run(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_another_has_written_to_the_same_place_meanwhile_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*_: object) -> float:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")
        return 0.0

    monkeypatch.setattr(merge_module, "_gap", meanwhile)
    with pytest.raises(Exception, match="out"):
        merge(make_run(tmp_path), tmp_path / "out", compare=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_what_cannot_be_merged_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        merge(run, tmp_path / "used")
    with pytest.raises(UserError, match="expected auto, base or dequantized"):
        merge(run, tmp_path / "out", onto="other")  # type: ignore[arg-type]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for key, value in (("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 8})):
        (run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=f"{key} is .*use PEFT's merge"):
            merge(run, tmp_path / "out")
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    quantized(tmp_path / "model").save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="holds quantized weights; name the original"):
        merge(run, tmp_path / "out", base=str(tmp_path / "small"))
    save_model(tmp_path / "other", tiny_model("llama", attention=None, num_hidden_layers=1))
    with pytest.raises(
        UserError,
        match=r"adapter has weights for model\.layers\.1\..* neither a linear layer nor experts of .*; name .*--base",
    ):
        merge(run, tmp_path / "out", base=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_folder_is_merged_with_the_settings_of_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    merge(run / "adapter", tmp_path / "one", onto="dequantized", compare=False)
    merge(run, tmp_path / "two", onto="dequantized", compare=False)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(left[key], right[key]) for key in left)
