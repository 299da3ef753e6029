"""Streamed loading: the bits of transformers and bitsandbytes, in bounded memory; 4-bit files; random weights."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as functional
import pytest
import torch
from helpers.ranks import run_python
from helpers.tiny_models import FAMILIES, save_model, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_dist.commands import invoke
from qlora_dist.console import Console
from qlora_dist.errors import MachineFailed, UserError
from qlora_dist.model import (
    base_checksum,
    base_weights,
    check_config,
    check_head,
    linear_layers,
    load_base,
    quantize_model,
)
from qlora_dist.model import load as base_module
from qlora_dist.model.weights import cache_4bit as four_bit_files
from qlora_dist.model.weights import quantize, sources
from qlora_dist.model.weights.quantize import Range, make_state, quantize_range, shard_range
from qlora_dist.model.weights.safetensors_files import BadFile, WeightFiles

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


def load(folder: Path | str, quantization: Any = "nf4", dtype: torch.dtype = BF16, **changes: Any) -> Any:
    options = {"double_quant": True, "compute_dtype": dtype, "attention": "auto", "device": CPU, **changes}
    return load_base(str(folder), quantization=quantization, **options)


def by_transformers(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **changes: Any) -> Any:
    """The same base through from_pretrained: the reference."""
    with monkeypatch.context() as patch:
        patch.setattr(base_module, "open_source", lambda *_: None)
        return load(*arguments, **changes)


# --- equal to transformers and bitsandbytes ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_streamed_to_the_same_bits_as_by_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path, tiny_model(family, attention=None), tokenizer=False)
    monkeypatch.setattr(quantize, "PIECE", 64 * 7)  # pieces that end inside rows
    for quantization in ("nf4", "none"):
        with caplog.at_level("INFO", logger="qlora_dist"):
            streamed = load(tmp_path, quantization)
        assert "not streamed" not in caplog.text
        reference = by_transformers(monkeypatch, tmp_path, quantization)
        assert base_checksum(streamed) == base_checksum(reference)
        assert streamed.generation_config.to_dict() == reference.generation_config.to_dict()
        tied = [model.get_input_embeddings().weight is model.get_output_embeddings().weight for model in
                (streamed, reference)]  # fmt: skip
        assert tied[0] == tied[1]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_in_pieces_and_shards_has_the_bits_of_bitsandbytes(
    quant_type: str, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "PIECE", 64 * 50)
    weight = torch.randn(300, 192, generator=torch.Generator().manual_seed(0)).to(BF16)  # 900 blocks: 3.5 nested ones
    codes, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double_quant)
    flat = weight.view(-1)
    for size in (1, 2, 7, 901):  # the last: more ranks than blocks
        shards = [shard_range(flat.numel(), rank, size) for rank in range(size)]
        ours_codes = torch.empty_like(codes)
        absmax = torch.cat([
            quantize_range(ours_codes[s.start // 2 : s.stop // 2], lambda a, b: flat[a:b], s, quant_type, BF16)
            for s in shards
        ])  # fmt: skip
        assert torch.equal(ours_codes, codes)
        ours = make_state(absmax, (300, 192), quant_type, BF16, double_quant).as_dict(packed=True)
        theirs = state.as_dict(packed=True)
        assert ours.keys() == theirs.keys() and len(ours) == (5 if double_quant else 3)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_weights_without_the_prefix_of_the_base_model_and_in_several_files_are_found(
    folder: Path, tmp_path: Path
) -> None:
    weights = load_file(folder / "model.safetensors")
    plain = {key.removeprefix("model."): value for key, value in weights.items()}
    tiny_config("llama").save_pretrained(tmp_path)
    names = sorted(plain)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in files.items():
        save_file({key: plain[key] for key in keys}, tmp_path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert base_checksum(load(tmp_path)) == base_checksum(load(folder))


def test_tied_weights_that_differ_in_the_files_stay_untied_and_equal_ones_are_tied(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(folder / "model.safetensors")
    tiny_config("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    for head, is_tied in ((weights["model.embed_tokens.weight"].clone(), True), (weights["lm_head.weight"], False)):
        save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = load(tmp_path)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
        check_head(model)
    assert "differ in the files: they stay untied" in caplog.text
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"].to(BF16))


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_is_found_under_either_name(
    kept: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(folder / "model.safetensors")
    table = weights.pop("model.embed_tokens.weight")
    weights.pop("lm_head.weight")
    tiny_config("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    save_file({**weights, kept: table}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(base_module, "_from_pretrained", None)  # it is streamed
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, table.to(BF16))


def test_a_family_whose_files_must_be_converted_is_loaded_by_transformers_with_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_stacks", lambda converter: False)  # as of a family that is stacked in another way
    save_model(tmp_path, tiny_model("mixtral", attention=None), tokenizer=False)
    with caplog.at_level("INFO", logger="qlora_dist"):
        model = load(tmp_path, "none")
    assert "weights are loaded by transformers, not streamed: model.layers" in caplog.text
    assert "must be converted" in caplog.text
    assert not any(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(
        UserError, match=r"must be converted while they are read, which leaves stacked experts in 16 bits"
    ):
        load(tmp_path, "nf4")


_FROM_HUB = """
    import sys
    import torch
    from qlora_dist.model import base_checksum, load_base
    for name in sys.argv[1:]:
        model = load_base(name, quantization="nf4", double_quant=True, compute_dtype=torch.bfloat16,
                          attention="auto", device=torch.device("cpu"))
        print(base_checksum(model), model.generation_config.temperature)
"""


def test_a_model_in_the_local_hub_cache_is_streamed_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = save_model(repository / "snapshots" / ("0" * 40))
    (snapshot / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    by_name, by_folder = run_python(_FROM_HUB, "some/model", str(snapshot), timeout=240).stdout.splitlines()
    assert by_name == by_folder and by_name.endswith(" 0.25")


def test_a_damaged_file_is_named(folder: Path, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for damaged, message in (
        (whole[:-100], "is not where the header places it; the file is truncated or damaged"),
        (whole[:4], "not a safetensors file, or truncated"),
        (b"\xff" * 4096, "not a safetensors file, or truncated"),
        ((20).to_bytes(8, "little") + b"x" * 20, "its header is not JSON"),
    ):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(BadFile, match=message):
            WeightFiles([tmp_path / "model.safetensors"])
        with pytest.raises(UserError, match=f"weights cannot be read .*{message}"):
            load(tmp_path)


def test_loading_shows_how_far_it_is(tmp_path: Path) -> None:
    save_model(tmp_path)
    seconds = itertools.count(0.0, 10.0)
    with Console(True, said := io.StringIO(), lambda: next(seconds)):
        load(tmp_path)
    shares = [line.split("  ")[0] for line in said.getvalue().splitlines()]
    assert len(shares) > 5 and shares[-1] == "loading the base 100%", shares


# --- quantize and its copy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantization", "double_quant"), [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_quantized_checkpoint_loads_in_stock_transformers_and_here_to_the_bits_of_the_original(
    family: str, quantization: Any, double_quant: bool, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", tiny_model(family, attention=None))
    out = tmp_path / "out"
    flag = "--double-quant" if double_quant else "--no-double-quant"
    assert invoke(["quantize", str(source), str(out), "--quantization", quantization, flag]) == 0
    assert not list(tmp_path.glob(".out*"))
    expected = load(source, quantization, double_quant=double_quant)
    assert base_checksum(load(out, quantization, double_quant=double_quant)) == base_checksum(expected)
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=BF16)
    theirs, ours = dict(base_weights(stock)), dict(base_weights(expected))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert (out / "tokenizer.json").exists()
    with pytest.raises(UserError, match="the run requests none"):
        load(out, "none")


def test_codes_saved_as_a_float_type_are_read_as_bytes(folder: Path, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_quant_storage=BF16)  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=settings, device_map="cpu")
    stock.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == BF16
    model = load(tmp_path)
    assert linear_layers(model)["model.layers.0.mlp.up_proj"].weight.dtype == torch.uint8
    assert base_checksum(model) == base_checksum(load(folder))


def test_the_quantized_checkpoint_is_split_into_files_and_appears_complete_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_model(str(folder), tmp_path / "out", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert base_checksum(load(tmp_path / "out")) == base_checksum(load(folder))

    written = []
    monkeypatch.setattr(four_bit_files, "save_file", lambda *_, **__: written.append(1) or _full_disk())
    with pytest.raises(MachineFailed, match=r"No space left .*No part of the model was kept"):
        quantize_model(str(folder), tmp_path / "other")
    assert written and [path.name for path in tmp_path.iterdir()] == ["out"]


def _full_disk() -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_quantized_is_rejected_with_the_reason(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_model(str(folder), tmp_path / "out")
    with pytest.raises(UserError, match=r"already quantized .*give the 16-bit model"):
        quantize_model(str(tmp_path / "out"), tmp_path / "again")
    with pytest.raises(UserError, match="already exists and is not empty; give a new folder"):
        quantize_model(str(folder), tmp_path / "out")
    save_model(tmp_path / "experts", tiny_model("mixtral", attention=None), tokenizer=False)
    monkeypatch.setattr(sources, "_stacks", lambda converter: False)
    with pytest.raises(UserError, match=r"cannot be quantized one by one \(model.layers.* must be converted"):
        quantize_model(str(tmp_path / "experts"), tmp_path / "again")
    with pytest.raises(UserError, match="4-bit checkpoints: nf4 or fp4, not int8"):
        quantize_model(str(folder), tmp_path / "again", quantization="int8")
    assert invoke(["quantize", str(tmp_path / "absent"), str(tmp_path / "again")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


# --- random weights ---------------------------------------------------------------------------------------------------


def test_random_weights_need_only_config_json_and_depend_on_seed_and_name(tmp_path: Path) -> None:
    tiny_config("llama", hidden_size=256, num_hidden_layers=8).save_pretrained(tmp_path)
    check_config(str(tmp_path), device_type="cpu", weights="random")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        check_config(str(tmp_path), device_type="cpu")
    model = load(tmp_path, "none", torch.float32, weights="random", seed=5)
    layers = linear_layers(model)
    plain, residual = layers["model.layers.3.mlp.up_proj"].weight, layers["model.layers.3.mlp.down_proj"].weight
    assert plain.std().item() == pytest.approx(0.02, rel=0.02)  # 32,768 draws: their standard deviation is 0.4 % off
    assert residual.std().item() == pytest.approx(0.02 / 4, rel=0.02)  # 1 / sqrt(2 * 8)
    assert (model.model.norm.weight == 1).all()
    assert not torch.equal(plain, layers["model.layers.4.mlp.up_proj"].weight)
    assert base_checksum(load(tmp_path, "none", torch.float32, weights="random", seed=5)) == base_checksum(model)
    assert base_checksum(load(tmp_path, "none", torch.float32, weights="random", seed=6)) != base_checksum(model)
    packed = load(tmp_path, "nf4", weights="random", seed=5)
    check_head(packed)
    codes, state = functional.quantize_4bit(plain.to(BF16), quant_type="nf4", compress_statistics=True)
    layer = linear_layers(packed)["model.layers.3.mlp.up_proj"]
    assert torch.equal(layer.weight, codes) and torch.equal(layer.weight.quant_state.absmax, state.absmax)
    with pytest.raises(UserError, match="random, which int8 does not support"):
        load(tmp_path, "int8", weights="random")


def test_any_part_of_a_random_weight_is_the_same_however_it_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_dist.model.weights import sources

    monkeypatch.setattr(sources, "RANDOM_CHUNK", 100)
    model = tiny_model(attention=None)
    source = sources.RandomSource(model, model.config, 3, CPU)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = source.read(name, 0, 8192)
    parts = [source.read(name, start, stop) for start, stop in ((0, 1), (1, 250), (250, 300), (300, 8192))]
    assert torch.equal(torch.cat(parts), whole) and len(whole.unique()) > 8000
    assert Range(0, 4096) == shard_range(8192, 0, 2)
