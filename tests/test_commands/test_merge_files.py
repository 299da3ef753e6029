"""Merging weight by weight: the files of a merge in memory, bit for bit, in the memory of a weight and a layer."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.ranks import on_ranks
from helpers.tiny_models import random_batch, save_model, tiny_model
from helpers.tiny_run import changed, make_inputs, train_here
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_dist.commands.merge import merge
from qlora_dist.commands.merged import Adapter
from qlora_dist.config.run_dir import RunDir
from qlora_dist.memory.live_bytes import LiveBytes
from qlora_dist.model import INFERENCE, is_conv1d, linear_layers, load_base, quantized_and_back, stacked_experts
from qlora_dist.model.lora import attach_lora, load_adapters, trainable_parameters
from qlora_dist.model.lora_files import save_adapter
from qlora_dist.model.one_by_one import is_finite, open_base, run_layer_by_layer
from qlora_dist.model.reference_logits import Reference

CPU, BF16 = torch.device("cpu"), torch.bfloat16
INDEX = "model.safetensors.index.json"
merge_module = sys.modules[merge.__module__]  # `commands.merge` is the command


def _run(folder: Path, model: Any) -> Path:
    """A run directory with an adapter that changes much, on this base."""
    raw = make_inputs(folder)
    model.save_pretrained(folder / "model", max_shard_size="100KB")
    if (folder / "model" / INDEX).exists():
        (folder / "model/model.safetensors").unlink()
    run = Path(raw["run_dir"])
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    settings: Any = {"quantization": "nf4", "double_quant": True, "compute_dtype": torch.float32, "device": CPU}
    adapted = attach_lora(load_base(str(folder / "model"), attention="auto", **settings), rank=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(adapted).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_adapter(adapted, run / "adapter", str(folder / "model"))
    return run


@torch.no_grad()
def _merged_in_memory(run: Path, onto: str, dtype: torch.dtype, out: Path) -> None:
    """The merge of version 0.2: the whole model in memory, changed in place, written by transformers."""
    raw = yaml.safe_load((run / "config.yaml").read_text())
    adapter = Adapter.read(run / "adapter", None)
    base: Any = load_base(
        raw["model"]["name"], quantization="none", double_quant=False, compute_dtype=torch.float32,
        attention=INFERENCE, device=CPU,
    )  # fmt: skip

    def original(weight: torch.Tensor) -> torch.Tensor:
        return quantized_and_back(weight, "nf4", True, torch.float32) if onto == "dequantized" else weight

    for name, layer in linear_layers(base).items():
        weight = layer.weight.data.T if is_conv1d(layer) else layer.weight.data
        weight = original(weight)
        if (factors := adapter.layers.get(name)) is not None:
            weight = weight + adapter.scale * (factors.b @ factors.a)
        layer.weight.data = (weight.T if is_conv1d(layer) else weight).contiguous()
    for experts in stacked_experts(base).values():
        for parameter in experts.parameters(recurse=False):
            parameter.data = torch.stack([original(matrix) for matrix in parameter.data])
    base.to(dtype)
    base.config.dtype = dtype
    base.save_pretrained(out, max_shard_size="100KB")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.parametrize("onto", ["base", "dequantized"])
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("mixtral", {})]
)
def test_the_files_are_those_of_a_merge_in_memory(
    family: str, changes: dict[str, Any], onto: Any, tmp_path: Path
) -> None:
    run = _run(tmp_path, tiny_model(family, attention=None, **changes))
    _merged_in_memory(run, onto, BF16, tmp_path / "expected")
    merge(run, tmp_path / "out", onto=onto, compare=False, max_shard_size="100KB")
    expected, found = _tensors(tmp_path / "expected"), _tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [
        key for key, value in expected.items() if not torch.equal(found[key].view(torch.int16), value.view(torch.int16))
    ] == []
    original = _tensors(tmp_path / "model")
    assert sum(not torch.equal(found[key], original[key].to(BF16)) for key in found) >= 8  # the guard
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "expected/config.json").read_bytes()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    by_file = {file: load_file(tmp_path / "out" / file).keys() for file in set(index["weight_map"].values())}
    assert len(by_file) > 1 and all(key in by_file[file] for key, file in index["weight_map"].items())
    if family != "mixtral":  # whose experts transformers keeps in one file while they share memory
        assert index == json.loads((tmp_path / "expected" / INDEX).read_text())


def test_layer_by_layer_gives_the_logits_of_the_loaded_model(tmp_path: Path) -> None:
    """Of samples of different lengths, and each weight is asked for once."""
    samples = [random_batch((length,), seed=length).input_ids[0].tolist() for length in (9, 4, 12)]
    for family in ("llama", "gemma2", "qwen3_moe"):
        save_model(tmp_path / family, tiny_model(family, attention=None))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32).eval()
        base, asked = open_base(str(tmp_path / family)), []

        def weight(name: str, base: Any = base, asked: list[str] = asked) -> torch.Tensor:
            asked.append(name)
            return base.weight(name)

        found = run_layer_by_layer(base, weight, samples, torch.float32, CPU)
        for ids, logits in zip(samples, found, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        assert len(asked) == len(set(asked)) > 10


def test_of_a_buffer_minus_infinity_is_no_fault() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    assert is_finite(mask, is_buffer=True) and not is_finite(mask)
    assert not is_finite(-mask, is_buffer=True) and not is_finite(torch.tensor([torch.nan]), is_buffer=True)
    assert is_finite(torch.tensor([1])) and is_finite(torch.empty(0))


def test_a_base_with_a_number_that_is_none_is_refused_and_nothing_written(tmp_path: Path) -> None:
    run = _run(tmp_path, tiny_model("llama", attention=None))
    broken = next(path for path in (tmp_path / "model").glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(broken)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, broken, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"norm.*NaN or infinite.*Get the files again"):
        merge(run, tmp_path / "out", compare=False)
    assert not (tmp_path / "out").exists()


# --- what a run keeps for it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two ranks with a sharded base."""
    raw = changed(make_inputs(tmp_path_factory.mktemp("sharded")), strategy__name="fsdp")
    on_ranks(train_here, 2, raw)
    return raw


def test_a_run_keeps_the_logits_of_its_own_model(sharded: dict[str, Any]) -> None:
    run = RunDir(Path(sharded["run_dir"]))
    kept = Reference.load(run.reference, run.adapter)
    assert kept is not None and len(kept.samples) == len(kept.logits) == 4
    base: Any = load_base(
        sharded["model"]["name"], quantization="nf4", double_quant=True, compute_dtype=torch.float32,
        attention=INFERENCE, device=CPU,
    )  # fmt: skip
    trained: Any = load_adapters(base, {"one": run.adapter})
    for ids, logits in zip(kept.samples, kept.logits, strict=True):
        with torch.no_grad():
            expected = trained(torch.tensor([ids])).logits[0]
            with trained.disable_adapter():
                assert (base(torch.tensor([ids])).logits[0] - logits).abs().max() > 0.01  # the guard
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-5)


def test_a_merge_compares_with_them_and_loads_nothing_else(
    sharded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(sharded["run_dir"])
    by_loading = merge_module.load_trained
    loaded: list[Any] = []
    monkeypatch.setattr(merge_module, "load_trained", lambda *given: loaded.append(given) or by_loading(*given))
    for number, path in enumerate((run, run / "adapter")):
        report = merge(path, tmp_path / str(number), onto="dequantized", dtype=torch.float32, compare=False)
        assert report.gaps["dequantized"] < 1e-4 and loaded == []
    # another adapter, a damaged file, and a run of an earlier version: computed, as before
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    (other / "adapter").mkdir()
    for file in (run / "adapter").iterdir():
        (other / "adapter" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "adapter/adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key] *= 1.5
    save_file(tensors, other / "adapter/adapter_model.safetensors")
    kept = (run / "reference.safetensors").read_bytes()
    for number, content in enumerate((kept, kept[:100], None)):
        loaded.clear()
        (other / "reference.safetensors").unlink(missing_ok=True)
        if content is not None:
            (other / "reference.safetensors").write_bytes(content)
        with caplog.at_level(logging.INFO):
            report = merge(other, tmp_path / f"o{number}", onto="dequantized", dtype=torch.float32, compare=False)
        assert report.gaps["dequantized"] < 1e-4 and len(loaded) == 1
    assert "the logits of another adapter" in caplog.text and "reference.safetensors cannot be read" in caplog.text


# --- memory -----------------------------------------------------------------------------------------------------------


class _Held(LiveBytes):
    """Bytes of tensors with storage."""

    def count(self, tensor: torch.Tensor, category: str | None = None) -> None:
        if tensor.device.type != "meta":
            super().count(tensor, category)


@pytest.mark.parametrize("onto", ["base", "dequantized"])
def test_memory_is_bounded_by_a_layer_and_a_few_weights_not_by_the_model(onto: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12, "head_dim": 32}
    run = _run(tmp_path, tiny_model("llama", attention=None, **sizes))
    Reference([[3, 4, 5]], [torch.zeros(3, 128)]).save(run / "reference.safetensors", run / "adapter")
    size = sum(value.nbytes for value in _tensors(tmp_path / "model").values())
    layer = size // 12
    with _Held() as held:
        merge(run, tmp_path / "out", onto=onto, compare=False, dtype=torch.float32)
    # one layer, embedding and head (64 KB each), logits; or the largest weight in fp32 (256 KB) four times: as it is
    # stored, dequantized, what is added, and the sum
    largest = 4 * 128 * 512
    bound = layer + 4 * largest
    assert size > 4 * bound
    assert layer < held.peak_bytes < bound, (held.peak_bytes, held.peak_at, held.peak)
    assert len(_tensors(tmp_path / "out")) == len(_tensors(tmp_path / "model"))
