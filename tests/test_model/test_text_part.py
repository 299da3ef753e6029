"""The text model of a wrapper: the same loss, gradients, codes and adapter as in transformers' own wrapper."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks
from helpers.shards import load, world_and_shards
from helpers.tiny_models import (
    OTHER_TOWERS,
    WRAPPED,
    WRAPPED_ALSO,
    WRAPPED_HYBRIDS,
    alone,
    random_batch,
    save_model,
    tiny_wrapper,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from qlora_dist.config.wrappers import WRAPPERS, Wrapper
from qlora_dist.errors import UserError
from qlora_dist.memory.families import shapes_from_config
from qlora_dist.memory.measured_shapes import measure_shapes
from qlora_dist.memory.read_shapes import read_config_json, read_shapes
from qlora_dist.model import (
    base_checksum,
    base_weights,
    check_blocks,
    check_config,
    check_head,
    held_bytes,
    hidden_states,
    linear_layers,
    load_base,
    load_config,
    output_head,
    quantize_model,
)
from qlora_dist.model.base_weights import own_part
from qlora_dist.model.bitsandbytes_import import bitsandbytes
from qlora_dist.model.lora import attach_lora, load_adapters, trainable_parameters
from qlora_dist.model.lora_files import read_adapter, save_adapter, verify_adapter_file
from qlora_dist.model.weights.safetensors_files import WeightFiles
from qlora_dist.train.checks.base import check_base_bytes, check_source_bits, promised_base_bytes

CPU = torch.device("cpu")
LENGTHS = (9, 6, 5)
KEY_MAPPING = {r"^model\.(language|text)_model": "model"}  # as in docs/models.md


def base_of(folder: Path | str, quantization: Any = "none", **changes: Any) -> Any:
    settings = {"compute_dtype": torch.float32, "attention": "sdpa", "device": CPU, "double_quant": True, **changes}
    return load_base(str(folder), quantization=quantization, **settings)


@pytest.fixture(scope="module", params=WRAPPED)
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), tiny_wrapper(request.param))


@pytest.fixture(scope="module", params=WRAPPED | WRAPPED_ALSO | WRAPPED_HYBRIDS)
def each(request: Any, tmp_path_factory: Any) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), tiny_wrapper(request.param))


def without_wrapper(name: str) -> str:
    """A name in the wrapper as it is in the text class."""
    return re.sub(r"model\.(language|text)_model\.", "model.", name)


def adapted(folder: Path, targets: Any = "all-linear") -> Any:
    """The text model with an adapter whose B is not zero, so that A learns too."""
    model = attach_lora(base_of(folder), rank=4, alpha=8, target_modules=targets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in trainable_parameters(model).items():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def family_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def nll(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")


def our_loss(model: Any, batch: Any) -> Tensor:
    logits = output_head(model).logits(hidden_states(model, batch))
    parts = zip(logits.split(LENGTHS), batch.input_ids[0].split(LENGTHS), strict=True)
    return torch.stack([nll(*part) for part in parts]).sum()


def test_every_wrapper_that_is_accepted_is_tested() -> None:
    assert WRAPPED.keys() | WRAPPED_ALSO.keys() | WRAPPED_HYBRIDS.keys() == WRAPPERS.keys()


# --- the same mathematics ---------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_the_stock_wrapper_with_the_saved_adapter(each: Path, tmp_path: Path) -> None:
    """In fp32; ours packed, transformers' wrapper with each document alone, the adapter loaded by stock PEFT."""
    check_config(str(each), device_type="cpu")
    model, batch = adapted(each), random_batch(LENGTHS)
    check_head(model)
    check_blocks(model)
    save_adapter(model, tmp_path, str(each))
    verify_adapter_file(model, tmp_path, must_be_trained=True)
    loss = our_loss(model, batch)
    loss.backward()
    ours = {key.replace(".default", ""): value.grad for key, value in trainable_parameters(model).items()}

    stock = AutoModelForMultimodalLM.from_pretrained(each, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(stock, str(tmp_path), is_trainable=True).eval()
    losses = [nll(theirs(input_ids=one.input_ids).logits[0], one.input_ids[0]) for one in alone(batch)]
    torch.stack(losses).sum().backward()
    grads = {key.replace(".default", ""): value.grad for key, value in trainable_parameters(theirs).items()}
    assert abs(loss - sum(losses)) <= 1e-5 * loss
    assert len(grads) == len(ours) == len(load_file(tmp_path / "adapter_model.safetensors"))
    for key, grad in grads.items():
        assert grad is not None and grad.abs().max() > 0, key
        assert (ours[without_wrapper(key)] - grad).abs().max() <= 1e-5 * grad.abs().max().clamp_min(1.0), key


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_in_three_dimensions_are_plain_ones_for_text(family: str, tmp_path: Path) -> None:
    """M-RoPE, bit for bit; the guard: where the three differ, as in an image, so does the result."""
    wrapper = tiny_wrapper(family)
    wrapper.config.save_pretrained(tmp_path)
    theirs = wrapper.get_decoder().rotary_emb
    ours = AutoModelForCausalLM.from_config(load_config(str(tmp_path))).model.rotary_emb
    x, positions = torch.zeros(1, 40, 64), torch.arange(40)[None]
    for own, other in zip(ours(x, positions), theirs(x, positions.expand(3, 1, -1)), strict=True):
        assert torch.equal(own.view_as(other), other)
    image = torch.stack([positions, positions // 4, positions % 4])
    assert not torch.equal(ours(x, positions)[0], theirs(x, image)[0].view(1, 40, -1))


@torch.no_grad()
def test_the_saved_adapter_gives_our_logits_in_the_stock_text_class(each: Path, tmp_path: Path) -> None:
    """With the key mapping of docs/models.md: PEFT's keys hold the paths of modules, and the classes differ in them."""
    model, batch = adapted(each), random_batch((12,))
    save_adapter(model, tmp_path, str(each))
    ours = output_head(model).logits(hidden_states(model, batch))
    text = AutoModelForCausalLM.from_config(load_config(str(each)), dtype=torch.float32).eval()
    text.load_state_dict(base_of(each).state_dict())
    plain = text(input_ids=batch.input_ids).logits[0]
    with_adapter = PeftModel.from_pretrained(text, str(tmp_path), key_mapping=KEY_MAPPING)
    theirs = with_adapter(input_ids=batch.input_ids).logits[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (theirs - plain).abs().max() > 0.1


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), ("layers.1.self_attn.q_proj",)])
def test_the_saved_targets_select_the_adapted_layers_in_both_classes_and_no_other(
    folder: Path, targets: Any, tmp_path: Path
) -> None:
    save_adapter(adapted(folder, targets), tmp_path, str(folder))
    expected = read_adapter(tmp_path)[1].keys()
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    wrapper = tiny_wrapper(family_of(folder))
    chosen = {name for name, _ in wrapper.named_modules() if re.fullmatch(pattern, name)}
    assert chosen == expected and all(name.startswith("model.language_model.layers.") for name in chosen)
    text = {name for name, _ in base_of(folder).named_modules() if re.fullmatch(pattern, name)}
    assert text == {without_wrapper(name) for name in expected}


@torch.no_grad()
def test_adapters_are_read_under_the_names_of_either_class(folder: Path, tmp_path: Path) -> None:
    """One from training the text class (with PEFT, for example), to start from and to generate with."""
    model, batch = adapted(folder), random_batch((12,))
    expected = hidden_states(model, batch)
    save_adapter(model, tmp_path / "wrapper", str(folder))
    save_adapter(model, tmp_path / "text", str(folder))
    weights = load_file(tmp_path / "text/adapter_model.safetensors")
    renamed = {without_wrapper(key): value for key, value in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "text/adapter_model.safetensors", metadata={"format": "pt"})
    for form in ("wrapper", "text"):
        again = attach_lora(base_of(folder), rank=4, alpha=8, init_from=tmp_path / form)
        assert torch.equal(hidden_states(again, batch), expected)
        loaded = load_adapters(base_of(folder), {"one": tmp_path / form, "two": tmp_path / form})
        torch.testing.assert_close(hidden_states(loaded, batch), expected, rtol=1e-5, atol=1e-5)
        loaded.set_adapter("two")
        torch.testing.assert_close(hidden_states(loaded, batch), expected, rtol=1e-5, atol=1e-5)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_no_byte_of_another_tower_is_read_and_one_line_says_what_is_left_out(
    each: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    read, original = set(), WeightFiles.read_bytes
    monkeypatch.setattr(
        WeightFiles, "read_bytes", lambda files, name, *part: read.add(name) or original(files, name, *part)
    )
    with caplog.at_level(logging.INFO, "qlora_dist"):
        model = base_of(each, "nf4")
    stored = load_file(each / "model.safetensors")
    rest = {key for key in stored if any(tower in key for tower in OTHER_TOWERS)}
    assert read == stored.keys() - rest and len(rest) > 10
    if not any("experts" in name for name in read):  # which are stored one by one and held as one
        assert len(read) == len(list(model.parameters()))
    weights = sum(stored[key].numel() for key in rest)
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert f"the {len(rest)} tensors of " in line and f"({weights:,} parameters) are left out: text only" in line


@pytest.mark.parametrize("form", ["modules of today", "no other towers"])
def test_files_of_every_form_of_names_give_the_same_base(each: Path, form: str, tmp_path: Path) -> None:
    """What transformers writes has the names of the first files, and so has `folder`."""
    stored = load_file(each / "model.safetensors")
    if form == "modules of today":
        wrapper = tiny_wrapper(family_of(each))
        changed = {key: value.contiguous() for key, value in wrapper.state_dict().items()}
        if wrapper.config.tie_word_embeddings:
            del changed["lm_head.weight"]
        assert any(re.match(r"model\.(language|text)_model\.layers\.", key) for key in changed)
    else:
        changed = {key: stored[key] for key in stored if not any(tower in key for tower in OTHER_TOWERS)}
        assert len(changed) < len(stored)
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((each / "config.json").read_text())
    model = base_of(tmp_path, "nf4")
    assert base_checksum(model) == base_checksum(base_of(each, "nf4"))
    assert "is bit-equal to its quantized source" in check_source_bits(
        model, str(tmp_path), compute_dtype=torch.float32
    )


@pytest.mark.parametrize(("quantization", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_codes_are_those_of_bitsandbytes_on_the_wrappers_weights(
    folder: Path, quantization: Any, double_quant: bool
) -> None:
    model = base_of(folder, quantization, double_quant=double_quant)
    decoder = dict(AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).get_decoder().named_modules())
    layers: dict[str, Any] = linear_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        source = decoder[name.removeprefix("model.")].weight.detach().contiguous()
        codes, state = bitsandbytes.functional.quantize_4bit(
            source, blocksize=64, compress_statistics=double_quant, quant_type=quantization
        )
        assert torch.equal(layer.weight.data, codes), name
        assert torch.equal(layer.weight.quant_state.absmax, state.absmax), name
    for seed in range(14):
        assert check_source_bits(model, str(folder), compute_dtype=torch.float32, seed=seed).endswith(
            "is bit-equal to its quantized source"
        )
    promised = promised_base_bytes(
        str(folder), quantization=quantization, double_quant=double_quant, dtype=torch.float32
    )
    check_base_bytes([("a", held_bytes(model))], promised.on_each_rank(), "ddp", slack=0)


def test_the_plan_is_of_the_text_model_and_of_a_known_family(each: Path) -> None:
    measured, model = measure_shapes(str(each)), base_of(each)
    shapes = shapes_from_config(read_config_json(str(each)))
    if family_of(each) in WRAPPED_HYBRIDS:  # whose layers are traced
        assert shapes is None and not measured.unknown
        shapes = measured
    else:
        assert shapes is not None and shapes.is_exact
    for field in ("num_layers", "hidden", "vocabulary", "num_heads", "num_kv_heads", "head_dim", "linears",
                  "norm_weights", "embedding_weights", "head_weights", "final_weights", "layer_prefix"):  # fmt: skip
        assert getattr(shapes, field) == getattr(measured, field), field
    facts = check_config(str(each), device_type="cpu")
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert set(facts.linear_names) == linear_layers(model).keys()


@pytest.mark.parametrize("tied", [True, False])
def test_the_wrappers_own_word_on_tied_embeddings_holds(each: Path, tied: bool, tmp_path: Path) -> None:
    wrapper = tiny_wrapper(family_of(each), tied=tied, tie_word_embeddings=not tied)
    save_model(tmp_path, wrapper, tokenizer=False)
    model = base_of(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.lm_head.weight, wrapper.lm_head.weight)
    assert (read_shapes(str(tmp_path)).head_weights == 0) == tied


def test_a_config_that_leaves_out_defaults_means_those_of_the_class(each: Path, tmp_path: Path) -> None:
    """Files on the hub name what differs from the class alone."""
    config = json.loads((each / "config.json").read_text())
    kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    config["text_config"] = {key: config["text_config"][key] for key in kept}
    config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shapes(str(tmp_path)).base_parameters == measure_shapes(str(tmp_path)).base_parameters


def test_the_4_bit_copy_is_a_text_model_and_its_adapter_one_of_the_wrapper(folder: Path, tmp_path: Path) -> None:
    quantize_model(str(folder), tmp_path / "copy", compute_dtype=torch.float32)
    copy = base_of(tmp_path / "copy", "nf4", copy_of=str(folder))
    assert base_checksum(copy) == base_checksum(base_of(folder, "nf4"))
    save_adapter(attach_lora(copy, rank=4, alpha=8), tmp_path / "a", str(folder))
    assert all("model.language_model.layers" in key for key in load_file(tmp_path / "a/adapter_model.safetensors"))
    own = attach_lora(base_of(tmp_path / "copy", "nf4"), rank=4, alpha=8)
    save_adapter(own, tmp_path / "b", str(tmp_path / "copy"))
    assert all("model.model.layers" in key for key in load_file(tmp_path / "b/adapter_model.safetensors"))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_int8_is_refused_with_the_reason(folder: Path) -> None:
    with pytest.raises(UserError, match=r"int8 is read by transformers, with all towers; use nf4, fp4 or none"):
        base_of(folder, "int8")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3", {"final_logit_softcapping": 3.0}, "final_logit_softcapping to 3.0, by which the text model changes"),
        ("gemma3", {"use_bidirectional_attention": True}, "tokens see what follows them"),
        ("llava", {"model_type": "granite", "logits_scaling": 4.0}, "sets logits_scaling to 4.0"),
    ],
)
def test_a_text_model_that_differs_from_its_wrapper_is_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path, tiny_wrapper(family, **changes), tokenizer=False)
    with pytest.raises(UserError, match=message):
        check_config(str(tmp_path), device_type="cpu")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma4", r"gemma4 is made of several models \(audio_config, text_config, vision_config\); that its text"),
        ("paligemma", "has been shown only for gemma3, .*use another base model, or the text model's own files"),
        ("llama4", "stacked experts .* of an unsupported form"),
    ],
)
def test_other_wrappers_are_refused_with_the_reason(family: str, message: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        check_config(str(tmp_path), device_type="cpu")


def test_a_wrapper_around_other_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a later version of transformers gave one of the two classes a weight more."""
    save_model(tmp_path, tiny_wrapper("qwen3_vl"), tokenizer=False)
    monkeypatch.setitem(WRAPPERS, "qwen3_vl", Wrapper("qwen3_vl_text", is_tied=False, stand_in="qwen2"))
    with pytest.raises(
        UserError, match=r"of Qwen3VLForConditionalGeneration is not the same weight in Qwen2ForCausalLM"
    ):
        check_config(str(tmp_path), device_type="cpu")


def test_a_missing_weight_of_the_text_model_is_an_error(folder: Path, tmp_path: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(stored) if key.endswith(".layers.0.self_attn.q_proj.weight") and "vis" not in key)
    save_file({name: stored[name] for name in stored if name != key}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"1 weights are missing .*, first model\.layers\.0\.self_attn\.q_proj"):
        base_of(tmp_path)


# --- ranks ------------------------------------------------------------------------------------------------------------


def _sharded(folder: str) -> tuple[bool, float]:
    world, shards = world_and_shards()
    whole, sharded = load(folder, None), load(folder, shards)
    check_head(sharded)
    expected, found = dict(base_weights(whole)), dict(base_weights(sharded))
    norm = "model.layers.1.input_layernorm.weight"
    with torch.no_grad():
        batch = random_batch((9, 6))
        gap = float((hidden_states(sharded, batch) - hidden_states(whole, batch)).abs().max())
    same = torch.equal(own_part(found[norm]), expected[norm])
    world.close()
    return same, gap


def test_two_ranks_compute_what_one_computes(folder: Path) -> None:
    assert on_ranks(_sharded, 2, str(folder)) == [(True, 0.0)] * 2
