"""The base: what is read, rejected, frozen; hidden states and head; recomputation; the checksum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    FAMILIES,
    random_batch,
    save_model,
    shared_model,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file

from qlora_dist.config.names import resolve_targets
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.model import (
    INFERENCE,
    base_checksum,
    check_config,
    check_head,
    decoder_layers,
    evaluation_mode,
    hidden_states,
    is_4bit,
    linear_layers,
    load_base,
    output_head,
    set_recompute,
)
from qlora_dist.model.check_config import _check_experts
from qlora_dist.model.loss import nll_sum
from qlora_dist.model.pretrained import switch_dropout_off

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


def load(folder: Path, quantization: Any = "nf4", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    options = {"double_quant": True, "compute_dtype": dtype, "attention": "auto", "device": CPU, **changes}
    return load_base(str(folder), quantization=quantization, **options)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_every_linear_layer_except_the_head_is_4_bit_and_frozen(family: str, quantization: str, tmp_path: Path) -> None:
    model = load(save_model(tmp_path, tiny_model(family, attention=None)), quantization, torch.bfloat16)
    layers = linear_layers(model)
    assert len(layers) == (14 if family == "llama" else 8)
    for name, layer in layers.items():
        assert is_4bit(layer), name
        assert layer.weight.dtype == torch.uint8 and layer.compute_dtype == torch.bfloat16
        assert layer.weight.quant_state.quant_type == quantization and layer.weight.quant_state.nested
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # nothing is upcast to fp32: that costs gigabytes at 65B
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}
    assert not model.config.use_cache


def test_a_4_bit_layer_equals_the_product_with_its_dequantized_weight(tmp_path: Path) -> None:
    import bitsandbytes.functional as functional

    model = load(save_model(tmp_path, tiny_model("gpt2", attention=None)))
    layer = linear_layers(model)["transformer.h.0.attn.c_attn"]
    original = tiny_model("gpt2").transformer.h[0].attn.c_attn.weight.detach().T  # Conv1D is stored transposed
    restored = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert restored.shape == original.shape
    error = (restored - original).norm() / original.norm()
    assert 0.05 < error < 0.15  # NF4 on normal weights: about 9 %; 0 would mean that nothing was quantized
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ restored.T + layer.bias, atol=1e-5, rtol=1e-5)  # fp32 sums


def test_evaluating_on_a_cpu_does_not_change_the_base(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16)
    before = base_checksum(model)
    model.eval()
    with torch.no_grad():
        hidden_states(model, random_batch((5, 3)))
    assert base_checksum(model) == before
    assert not any(layer.support_avx512bf16_for_cpu for layer in linear_layers(model).values())


def test_the_checksum_changes_with_one_bit_of_codes_or_constants(folder: Path) -> None:
    model = load(folder)
    seen = {base_checksum(model)}
    weight = linear_layers(model)["model.layers.1.mlp.up_proj"].weight
    weight.data[7] ^= 1
    seen.add(base_checksum(model))
    weight.quant_state.absmax[0] ^= 1
    seen.add(base_checksum(model))
    model.model.norm.weight.data[0] += 1e-3
    seen.add(base_checksum(model))
    assert len(seen) == 4
    for bit in range(64):  # of one of the words that are summed, up to its highest
        weight.data[16 + bit // 8] ^= 1 << bit % 8
        seen.add(base_checksum(model))
        weight.data[16 + bit // 8] ^= 1 << bit % 8
    assert len(seen) == 68
    assert base_checksum(load(folder)) == base_checksum(load(folder))


def test_shapes_that_a_cpu_dequantizes_incorrectly_are_rejected_before_and_at_loading(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model("llama", attention=None, intermediate_size=96))
    message = r"layer model.layers.0.mlp.down_proj has 96 inputs, not a multiple of the quantization block size 64"
    with pytest.raises(UserError, match=message):
        check_config(str(tmp_path), device_type="cpu")
    with pytest.raises(UserError, match=message):
        load(tmp_path)
    check_config(str(tmp_path), device_type="cuda")
    load(tmp_path, "none")


def test_the_bases_dropout_is_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="qlora_dist"):
        model = load(save_model(tmp_path, tiny_model("gpt2", attention=None)), "none").train()
    assert "the base's dropout is off" in caplog.text
    batch = random_batch((6, 4))
    assert torch.equal(hidden_states(model, batch), hidden_states(model, batch))


def test_missing_weights_are_rejected_instead_of_drawn_at_random(tmp_path: Path) -> None:
    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"1 weights are missing or have the wrong shape.*model\.layers\.1\.mlp\.up_proj\.weight",
    ):
        load(tmp_path)


def test_pickled_weights_are_rejected_with_the_remedy(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for call in (lambda: check_config(str(tmp_path)), lambda: load(tmp_path)):
        with pytest.raises(UserError, match=r"pickled \(pytorch_model.bin\).*convert them to safetensors"):
            call()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        check_config(str(tmp_path))


def test_a_base_saved_in_4_bits_loads_to_the_same_bits_and_must_match_the_config(folder: Path, tmp_path: Path) -> None:
    model = load(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.bfloat16)
    assert base_checksum(again) == base_checksum(model)
    with pytest.raises(UserError, match="stored as nf4 with double_quant=True, the run requests fp4"):
        load(tmp_path, "fp4")
    with pytest.raises(UserError, match=r"requests nf4 with double_quant=False; set .* to the stored values"):
        load(tmp_path, double_quant=False)
    with pytest.raises(UserError, match="the run requests none"):
        load(tmp_path, "none")


def test_nothing_is_read_from_a_hub_for_a_path(tmp_path: Path) -> None:
    for name in ("./no/such/folder", str(tmp_path / "absent")):
        with pytest.raises(UserError, match="there is no such folder"):
            check_config(name)
        with pytest.raises(UserError, match="there is no such folder"):
            load_tokenizer(name)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        check_config(str(tmp_path))
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(str(tmp_path))


def test_a_path_with_a_tilde_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(check_config(f"~/{folder.name}").linear_names) == 14
    assert load_tokenizer(f"~/{folder.name}").is_fast
    assert linear_layers(load(Path(f"~/{folder.name}")))


def test_the_tokenizer_is_fast(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.is_fast
    assert tokenizer.encode("w5 w6 </s>", add_special_tokens=False) == [5, 6, 2]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


# --- preflight --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_pass_the_preflight(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")  # the weights are not inspected
    facts = check_config(str(tmp_path), device_type="cpu", row_tokens=64)
    model = tiny_model(family)
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert set(facts.linear_names) == set(linear_layers(model))
    assert not {"lm_head", "embed_out"} & set(facts.linear_names)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bloom", "cannot be trained|no flash attention|layers of bloom use"),
        ("mamba", "cannot be trained|no flash attention|layers of mamba"),
        ("minimax", "layers of type linear_attention, which carry state"),
        ("falcon", "cannot be trained|use the boundaries"),
        ("t5", "cannot be trained"),
        ("bert", "bert is not causal: in its attention tokens see what follows them"),
        ("deepseek_v32", "(indexed|deepseek_sparse)_attention, which choose the tokens that they attend to in a way"),
    ],
)
def test_families_whose_attention_cannot_be_packed_are_rejected(family: str, message: str, tmp_path: Path) -> None:
    changes = {"num_key_value_heads": 2} if family in ("minimax", "deepseek_v32") else {}
    tiny_config(family, **changes).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        check_config(str(tmp_path), quantization="none")


def test_experts_that_cannot_be_quantized_are_rejected(tmp_path: Path) -> None:
    tiny_config("llama4_text", num_key_value_heads=2, head_dim=16, num_local_experts=4).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"stacked experts.*of an unsupported form; set model\.quantization=none, or use a dense model$"
    ):
        check_config(str(tmp_path))
    with pytest.raises(UserError, match="chunked_attention"):  # then only its attention is in the way
        check_config(str(tmp_path), quantization="none")


def test_experts_that_are_plain_matrices_are_seen_and_other_weights_are_not_called_experts() -> None:
    for name, message in (("experts", "are stacked experts"), ("conv", "are matrices outside of linear layers")):
        model = tiny_model()
        holder = torch.nn.Module()
        holder.w1 = torch.nn.Parameter(torch.zeros(512, 512))
        setattr(model.model.layers[0].mlp, name, holder)
        with pytest.raises(UserError, match=message):
            _check_experts("base", model, "nf4", "cuda")


def test_models_that_need_custom_code_or_have_an_unknown_type_are_rejected(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = {"model_type": "nonsense", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(UserError, match="custom code"):
        check_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        check_config(str(tmp_path))


def test_target_modules_that_match_nothing_are_named_with_the_available_ones(folder: Path) -> None:
    with pytest.raises(UserError, match=r"wrong_proj matches no linear layer; available: down_proj, .*v_proj, or all-"):
        check_config(str(folder), target_modules=("q_proj", "wrong_proj"))
    with pytest.raises(UserError, match="lm_head matches no linear layer"):
        check_config(str(folder), target_modules=("lm_head",))
    names = check_config(str(folder)).linear_names
    assert len(resolve_targets(names, "all-linear")) == 14
    assert resolve_targets(names, ("self_attn.q_proj", "model.layers.1.mlp.up_proj")) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_rows_longer_than_learned_positions_are_an_error_but_than_rotary_ones_a_warning(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path, tiny_model("gpt2", attention=None))
    with pytest.raises(UserError, match=r"row_tokens is 65, .* learned positions for 64 tokens"):
        check_config(str(tmp_path), row_tokens=65)
    check_config(str(folder), row_tokens=65)
    assert "built for documents of up to 64 tokens" in caplog.text


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_head_of_hidden_states_equals_the_models_own_logits(family: str) -> None:
    model = tiny_model(family)
    switch_dropout_off(model)
    check_head(model)
    batch = random_batch((8,))
    own = tiny_model(family, attention="eager")(input_ids=batch.input_ids).logits[0]
    ours = output_head(model).logits(hidden_states(model, batch))
    torch.testing.assert_close(ours, own, atol=2e-5, rtol=1e-5)  # fp32 sums of 64 products


@pytest.mark.parametrize(("family", "field"), [("gemma2", "softcap"), ("cohere", "scale"), ("granite", "scale")])
def test_a_head_that_differs_from_the_models_is_rejected(
    family: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    plain = {"softcap": None, "scale": 1.0}[field]
    right = output_head(model)
    assert getattr(right, field) != plain
    monkeypatch.setattr("qlora_dist.model.forward.OutputHead", lambda w, b, c, s: type(right)(w, b))
    with pytest.raises(UserError, match="computes its logits in an unsupported way"):
        check_head(model)


def test_a_model_that_leaks_between_documents_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_dist.model import attention

    model = tiny_model()
    plain = attention._sdpa

    def leaky(q: Any, k: Any, v: Any, packed: Any, *rest: Any) -> torch.Tensor:
        length = q.shape[2]
        whole = attention.PackedDocuments("sdpa", (length,), torch.tensor([0, length]), length)
        return plain(q, k, v, whole, *rest)

    monkeypatch.setattr(attention, "_sdpa", leaky)
    with pytest.raises(UserError, match="lets a packed document see the one before it"):
        check_head(model)


def test_a_model_loaded_for_generation_rejects_packed_batches_and_uses_a_cache(folder: Path) -> None:
    model = load(folder, attention=INFERENCE)
    assert model.config.use_cache
    with pytest.raises(RuntimeError, match="loaded for generation"):
        hidden_states(model, random_batch((4,)))
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1] <= 5


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_recomputation_gives_bitwise_identical_loss_and_gradients(folder: Path, quantization: str) -> None:
    batch = random_batch((9, 5, 7))
    results = []
    for recompute, count in (("none", 0), (1, 1), ("full", 2)):
        model = load(folder, quantization).train()
        norm = model.model.layers[0].input_layernorm.weight.requires_grad_()  # the embedding below it stays frozen
        runs: list[int] = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        set_recompute(model, recompute)
        assert sum(layer.gradient_checkpointing for layer in decoder_layers(model)) == count
        loss = nll_sum(hidden_states(model, batch), output_head(model), batch.label_positions, batch.labels)
        loss.backward()
        assert len(runs) == (2 if recompute == "full" else 1)  # the guard: it really ran again
        results.append((loss.detach(), norm.grad))
    assert results[0][1].abs().max() > 0
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
    with pytest.raises(UserError, match=r"memory\.recompute is 3, but the model has 2 layers"):
        set_recompute(model, 3)


def test_evaluation_mode_restores_every_modules_mode() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


def test_nf4_is_better_than_fp4_on_a_pretrained_model() -> None:
    base = shared_model("stories260k")
    tokenizer = load_tokenizer(str(base))
    ids = tokenizer("Once upon a time, there was a little girl named Lily. She loved to play outside.")["input_ids"]
    losses = {}
    for quantization in ("none", "nf4", "fp4"):
        model = load(base, quantization, attention=INFERENCE)
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1]
        losses[quantization] = torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item()
    assert losses["none"] < losses["nf4"] < losses["fp4"] < losses["none"] + 0.5
