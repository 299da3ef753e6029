"""Adapters of stacked experts: their gradients against a plain loop in fp64, their files in stock PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_batch, save_model, tiny_model
from peft import PeftModel
from safetensors.torch import load_file
from test_experts import base_of, dequantized_copy, first_experts, routing
from torch import Tensor

from qlora_dist.errors import UserError
from qlora_dist.model import experts as experts_of_base
from qlora_dist.model import hidden_states, set_recompute
from qlora_dist.model.expert_updates import Update
from qlora_dist.model.experts import EXPERT_WEIGHTS, Experts4bit
from qlora_dist.model.lora import attach_lora, load_adapters, trainable_parameters
from qlora_dist.model.lora_files import read_adapter, save_adapter

RANK = 3


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return save_model(tmp_path_factory.mktemp("mixture"), tiny_model(request.param, attention=None))


def adapted(folder: Path, **settings: Any) -> Any:
    """With a B that is not zero, so that A learns too."""
    model = attach_lora(base_of(folder), rank=RANK, alpha=6, experts="all", **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in trainable_parameters(model).items():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


# --- products ---------------------------------------------------------------------------------------------------------


def plain_loop(experts: Experts4bit, updates: dict[str, Update], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """One token and one expert after another, with whole weights W_e + scale B_e A_e by PEFT's formula."""
    whole = []
    for name in EXPERT_WEIGHTS:
        weight = getattr(experts, name).dequantized(0, experts.num_experts, x.dtype)
        if (update := updates.get(name)) is not None:
            a = update.a.reshape(experts.num_experts, RANK, -1)
            b = update.b.reshape(-1, RANK, experts.num_experts)
            weight = weight + update.scale * torch.einsum("ore,eri->eoi", b, a)
        whole.append(weight)
    up, down = whole
    rows = []
    for token, chosen, scale in zip(x, index.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for slot, expert in enumerate(chosen):
            gate, value = (up[expert] @ token).chunk(2)
            row = row + scale[slot] * (down[expert] @ (torch.nn.functional.silu(gate) * value))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("largest", [1, 2**27])  # one expert at a time, all
@pytest.mark.parametrize("adapts", [EXPERT_WEIGHTS, EXPERT_WEIGHTS[:1], EXPERT_WEIGHTS[1:]])
@pytest.mark.parametrize("kind", ["all", "some without tokens", "one expert"])
def test_results_and_all_gradients_are_those_of_a_plain_loop(
    folder: Path, kind: str, adapts: tuple[str, ...], largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_of_base, "LARGEST_MATRIX", largest)
    experts = first_experts(base_of(folder))
    index = routing(kind, experts.num_experts, 2, 17)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weights, grad = draw(17, 64), draw(17, index.shape[1]), draw(17, 64)
    factors = {}
    for name in adapts:
        num_experts, outputs, inputs = getattr(experts, name).shape
        factors[name] = draw(num_experts * RANK, inputs) / 8, draw(outputs, RANK * num_experts)
    found = []
    for is_ours in (True, False):
        inputs = [one.clone().requires_grad_() for one in (x, weights)]
        own = {name: [one.clone().requires_grad_() for one in pair] for name, pair in factors.items()}
        updates = {name: Update(a, b, 0.7) for name, (a, b) in own.items()}
        args = inputs[0], index, inputs[1]
        out = experts(*args, updates) if is_ours else plain_loop(experts, updates, *args)
        out.backward(grad)
        found.append(
            [out.detach(), *(one.grad for one in inputs), *(one.grad for pair in own.values() for one in pair)]
        )
    assert len(found[0]) == 3 + 2 * len(adapts)
    for ours, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    without_tokens = sorted(set(range(experts.num_experts)) - set(index.unique().tolist()))
    assert bool(without_tokens) == (kind != "all")
    for grad_a, grad_b in zip(found[0][3::2], found[0][4::2], strict=True):
        assert not grad_a.view(experts.num_experts, RANK, -1)[without_tokens].any()
        assert not grad_b.view(-1, RANK, experts.num_experts)[..., without_tokens].any()


def test_no_weight_is_saved_and_recomputation_stops_before_the_last_product(folder: Path) -> None:
    model = adapted(folder).train()
    experts, called = first_experts(model), []
    for name in EXPERT_WEIGHTS:
        packed: Any = getattr(experts, name)
        original = packed._product

        def counted(*args: Any, name: str = name, original: Any = original, **named: Any) -> Tensor:
            called.append(name)
            return original(*args, **named)

        packed._product = counted
    gradients = []
    for recompute in ("none", "full"):
        called.clear()
        set_recompute(model, recompute)
        model.zero_grad()
        hidden_states(model, random_batch((9, 6))).sum().backward()
        gradients.append({name: weight.grad for name, weight in trainable_parameters(model).items()})
    assert (called.count("gate_up_proj"), called.count("down_proj")) == (3, 2)
    for name, grad in gradients[0].items():
        assert grad is not None and torch.equal(grad, gradients[1][name]), name


# --- in PEFT ----------------------------------------------------------------------------------------------------------


def test_the_saved_adapter_gives_equal_logits_in_stock_peft_on_the_stock_model(folder: Path, tmp_path: Path) -> None:
    """Loss and gradients too: over transformers' own model in fp32 whose quantized weights were quantized and back."""
    model = adapted(folder)
    save_adapter(model, tmp_path, str(folder))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    stock = dequantized_copy(folder)
    stock.set_attn_implementation("eager")
    theirs = PeftModel.from_pretrained(stock, str(tmp_path), is_trainable=True)
    ids = torch.tensor([[5, 9, 30, 7, 61, 12, 44, 8]])
    batch = random_batch((8,))
    batch.input_ids[:] = ids
    head = torch.linspace(-1, 1, 64)
    ours_out, theirs_out = hidden_states(model, batch), theirs.get_base_model().model(ids).last_hidden_state[0]
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), theirs.disable_adapter():
        assert (theirs.get_base_model().model(ids).last_hidden_state[0] - theirs_out).abs().max() > 0.05
    (ours_out @ head).sum().backward()
    (theirs_out @ head).sum().backward()
    expected = {name: weight.grad for name, weight in theirs.named_parameters() if weight.requires_grad}
    found = trainable_parameters(model)
    assert expected.keys() == found.keys() and sum("experts" in name for name in found) == 8
    for name, grad in expected.items():
        torch.testing.assert_close(found[name].grad, grad, rtol=2e-4, atol=2e-5)


def test_keys_and_shapes_are_pefts_and_the_file_is_read_back(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, target_modules=("q_proj",))
    save_adapter(model, tmp_path, str(folder))
    weights = {key: tuple(value.shape) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    experts = first_experts(model)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    for weight, start in (("gate_up_proj", f"{prefix}.base_layer"), ("down_proj", prefix)):
        count, outputs, inputs = getattr(experts, weight).shape
        assert weights.pop(f"{start}.lora_A.weight") == (count * RANK, inputs)
        assert weights.pop(f"{start}.lora_B.weight") == (outputs, RANK * count)
    assert len(weights) == 2 * 2 + 4
    _, layers = read_adapter(tmp_path)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", *EXPERT_WEIGHTS}
    outputs = {name.rpartition(".")[2]: len(factors.b) for name, factors in layers.items()}
    assert [outputs[name] for name in EXPERT_WEIGHTS] == [getattr(experts, name).shape[1] for name in EXPERT_WEIGHTS]
    batch = random_batch((9, 6))
    with torch.no_grad():
        again = load_adapters(base_of(folder), {"one": tmp_path, "two": tmp_path})
        assert torch.equal(hidden_states(again, batch), hidden_states(model, batch))
        again.base_model.set_adapter(["one", "two"])
        with pytest.raises(UserError, match="experts are computed with one adapter at a time"):
            hidden_states(again, batch)
    started = attach_lora(
        base_of(folder), rank=RANK, alpha=6, experts="all", target_modules=("q_proj",), init_from=tmp_path
    )
    assert torch.equal(hidden_states(started, batch), hidden_states(model, batch))


@torch.no_grad()
def test_an_adapter_of_one_weight_alone_is_read_as_such(folder: Path, tmp_path: Path) -> None:
    """As other programs make them: the only wrapper holds it."""
    from peft import LoraConfig, get_peft_model

    stock = dequantized_copy(folder)
    stock.set_attn_implementation("eager")
    config = LoraConfig(r=RANK, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    theirs = get_peft_model(stock, config)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    theirs.save_pretrained(tmp_path)
    _, layers = read_adapter(tmp_path)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "gate_up_proj"}
    batch = random_batch((9,))
    ours = hidden_states(load_adapters(base_of(folder), {"one": tmp_path}), batch)
    expected = theirs.get_base_model().model(batch.input_ids).last_hidden_state[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_scales_are_those_of_one_expert(folder: Path) -> None:
    """alpha / r, or alpha / sqrt(r) for rslora: r is of one expert, however many there are."""
    for variant, scale in (("lora", 6 / RANK), ("rslora", 6 / math.sqrt(RANK))):
        model = adapted(folder, variant=variant)
        wrapper = model.get_base_model().model.layers[0].mlp.experts
        assert [wrapper.scaling["default"], wrapper.base_layer.scaling["default"]] == [pytest.approx(scale)] * 2


# --- which ------------------------------------------------------------------------------------------------------------


def test_none_leaves_out_shared_experts_and_all_needs_stacked_ones(tmp_path: Path) -> None:
    save_model(tmp_path / "mixture", tiny_model("qwen2_moe", attention=None), tokenizer=False)
    targets = ("q_proj", "shared_expert_gate")
    for experts, expected in (("none", {"q_proj"}), ("shared", {*targets}), ("all", {*targets, "experts"})):
        model = attach_lora(base_of(tmp_path / "mixture"), rank=RANK, alpha=6, target_modules=targets, experts=experts)
        names = [name.replace(".base_layer", "").partition(".lora_")[0] for name in trainable_parameters(model)]
        assert {name.rpartition(".")[2] for name in names} == expected
        assert not any(name.endswith("mlp.gate") for name in names)  # the router
    save_model(tmp_path / "dense", tiny_model("qwen3", attention=None), tokenizer=False)
    with pytest.raises(UserError, match=r"lora\.experts is all, but this base has no stacked experts in 4 bits"):
        attach_lora(base_of(tmp_path / "dense"), rank=RANK, alpha=6, experts="all")
