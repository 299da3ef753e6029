"""Experts in 4 bits: their codes, their products against a plain loop and transformers', and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks, outcome
from helpers.shards import load, world_and_shards
from helpers.tiny_models import MIXTURES, alone, random_batch, save_model, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_dist.errors import RunFailed, UserError
from qlora_dist.model import (
    base_checksum,
    base_weights,
    check_config,
    check_gathered_layer,
    check_head,
    check_sharding,
    held_bytes,
    hidden_states,
    linear_layers,
    load_base,
    num_weights,
    packed_experts,
    quantize_model,
    quantized_and_back,
    set_recompute,
)
from qlora_dist.model import experts as experts_of_base
from qlora_dist.model.base_weights import own_part
from qlora_dist.model.bitsandbytes_import import bitsandbytes
from qlora_dist.model.experts import BIASES, Experts4bit, runs
from qlora_dist.model.lora import attach_lora, trainable_parameters
from qlora_dist.train.checks.base import check_base_bytes, check_source_bits, promised_base_bytes

CPU = torch.device("cpu")
KINDS = [("nf4", True), ("nf4", False), ("fp4", True)]


def base_of(folder: Path | str, quantization: Any = "nf4", double_quant: bool = True, **changes: Any) -> Any:
    settings = {"compute_dtype": torch.float32, "attention": "sdpa", "device": CPU, **changes}
    return load_base(str(folder), quantization=quantization, double_quant=double_quant, **settings)


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "gpt_oss"])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return save_model(tmp_path_factory.mktemp("mixture"), tiny_model(request.param, attention=None))


def first_experts(model: Any) -> Experts4bit:
    return next(module for module in model.modules() if isinstance(module, Experts4bit))


def dequantized_copy(folder: Path, quantization: Any = "nf4", double_quant: bool = True) -> Any:
    """The model in fp32 through transformers' own code, whose quantized weights were quantized and back."""
    model = base_of(folder, "none")
    model.config._experts_implementation = "eager"
    names = {f"{name}.weight" for name in linear_layers(model)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in names or weight.ndim == 3:
                for matrix in as_linear(model, weight) if weight.ndim == 3 else weight[None]:
                    matrix.copy_(quantized_and_back(matrix.contiguous(), quantization, double_quant, torch.float32))
    return model


def as_linear(model: Any, stacked: Tensor) -> Tensor:
    """(E, O, I): a view of the experts' matrices as those of linear layers."""
    return stacked.mT if model.config.model_type == "gpt_oss" else stacked


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantization", "double_quant"), KINDS)
def test_codes_and_constants_of_each_expert_are_those_of_bitsandbytes(
    folder: Path, quantization: Any, double_quant: bool
) -> None:
    plain = base_of(folder, "none")
    packed = packed_experts(base_of(folder, quantization, double_quant))
    assert len(packed) == 4
    for name, experts in packed.items():
        for index, matrix in enumerate(as_linear(plain, plain.get_parameter(name))):
            codes, state = bitsandbytes.functional.quantize_4bit(
                matrix.detach().contiguous(), blocksize=64, compress_statistics=double_quant, quant_type=quantization
            )
            assert torch.equal(experts.codes[index], codes.view(-1))
            assert torch.equal(experts.absmax[index], state.absmax)
            if double_quant:
                assert torch.equal(experts.nested_absmax[index], state.state2.absmax)
                assert torch.equal(experts.offset[index], state.offset.view(1))
            theirs = bitsandbytes.functional.dequantize_4bit(codes, state)
            assert torch.equal(experts.dequantized(index, index + 1, torch.float32)[0], theirs)
    assert not any(torch.equal(experts.codes[0], experts.codes[1]) for experts in packed.values())


def test_stacked_files_and_files_of_each_expert_give_the_same_base(folder: Path, tmp_path: Path) -> None:
    each = load_file(folder / "model.safetensors")
    if "gpt_oss" in (folder / "config.json").read_text():
        pytest.skip("its files hold experts stacked")
    assert any(".experts.0." in key for key in each), "transformers no longer writes experts one by one"
    stacked = {name: value.detach().contiguous() for name, value in base_of(folder, "none").state_dict().items()}
    save_file(stacked, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert base_checksum(base_of(tmp_path)) == base_checksum(base_of(folder))


def test_an_expert_that_is_missing_or_of_another_shape_is_an_error(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(weights) if re.search(r"\.experts\.(1\.|down_proj$)", key))
    for changed in ({}, {key: torch.zeros(64, 32)}):
        rest = {name: value for name, value in weights.items() if name != key} | changed
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(UserError, match=r"weights are missing or have the wrong shape, first model\.layers\.0"):
            base_of(tmp_path)


def test_the_4_bit_copy_is_the_same_base(folder: Path, tmp_path: Path) -> None:
    size = quantize_model(str(folder), tmp_path / "copy", compute_dtype=torch.float32)
    copy, original = base_of(tmp_path / "copy"), base_of(folder)
    assert base_checksum(copy) == base_checksum(original)
    assert size < held_bytes(original) * 1.5
    again = base_of(tmp_path / "copy", shards=None)
    assert packed_experts(again).keys() == packed_experts(original).keys()


def test_random_weights_are_those_of_files_of_that_shape(folder: Path) -> None:
    packed = packed_experts(base_of(folder, weights="random", seed=3))
    plain = base_of(folder, "none", weights="random", seed=3)
    for name, experts in packed.items():
        expected = as_linear(plain, plain.get_parameter(name))[1].contiguous()
        expected = quantized_and_back(expected, "nf4", True, torch.float32)
        assert torch.equal(experts.dequantized(1, 2, torch.float32)[0], expected)


# --- products ---------------------------------------------------------------------------------------------------------


def plain_loop(experts: Experts4bit, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """One token and one expert after another, by differentiable matrix products."""
    up = experts.gate_up_proj.dequantized(0, experts.num_experts, x.dtype)
    down = experts.down_proj.dequantized(0, experts.num_experts, x.dtype)
    up_bias, down_bias = (getattr(experts, name) for name in BIASES)
    rows = []
    for token, chosen, scale in zip(x, index.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for slot, expert in enumerate(chosen):
            grown = up[expert] @ token
            if up_bias is None:
                gate, value = grown.chunk(2)
                out = down[expert] @ (torch.nn.functional.silu(gate) * value)
            else:
                gate, value = (grown + up_bias[expert]).view(-1, 2).unbind(1)
                gate, value = gate.clamp(max=2.0), value.clamp(-2.0, 2.0)
                out = down[expert] @ ((value + 1) * gate * torch.sigmoid(1.702 * gate)) + down_bias[expert]
            row = row + scale[slot] * out
        rows.append(row)
    return torch.stack(rows)


def routing(kind: str, num_experts: int, top_k: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "one expert":
        return torch.full((tokens, 1), num_experts - 1)
    allowed = {"all": list(range(num_experts)), "some without tokens": [0, num_experts - 2, num_experts - 1]}[kind]
    picks = [torch.randperm(len(allowed), generator=generator)[:top_k] for _ in range(tokens)]
    return torch.tensor(allowed)[torch.stack(picks)]


@pytest.mark.parametrize("largest", [1, 2**14, 2**27])  # one expert at a time, two or three, all
@pytest.mark.parametrize("kind", ["all", "some without tokens", "one expert"])
def test_results_and_gradients_are_those_of_a_plain_loop(
    folder: Path, kind: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_of_base, "LARGEST_MATRIX", largest)
    experts = first_experts(base_of(folder))
    for name in BIASES:
        if getattr(experts, name) is not None:
            getattr(experts, name).data = getattr(experts, name).data.double()
    index = routing(kind, experts.num_experts, 2, 17)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(17, size, generator=generator, dtype=torch.float64) for size in (64, index.shape[1], 64)]
    found = []
    for forward in (experts, lambda *inputs: plain_loop(experts, *inputs)):
        x, weights = (tensor.clone().requires_grad_() for tensor in drawn[:2])
        out = forward(x, index, weights)
        out.backward(drawn[2])
        found.append((out.detach(), x.grad, weights.grad))
    for ours, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_runs_are_neighbouring_experts_with_tokens() -> None:
    assert list(runs([1, 2, 0, 3, 1, 1, 0, 0, 4], 2)) == [(0, 2), (3, 5), (5, 6), (8, 9)]
    assert list(runs([0, 0], 2)) == []
    assert list(runs([5, 5, 5], 3)) == [(0, 3)]


def test_no_weight_is_saved_and_recomputation_stops_before_the_last_product(folder: Path) -> None:
    """Gate and up are multiplied twice (forward, recomputed) and once backward, the last product once each way."""
    model = base_of(folder).train()
    experts, called = first_experts(model), []
    for name in ("gate_up_proj", "down_proj"):
        packed: Any = getattr(experts, name)
        original = packed._product

        def counted(*args: Any, name: str = name, original: Any = original, **named: Any) -> Tensor:
            called.append(name)
            return original(*args, **named)

        packed._product = counted
    set_recompute(model, "full")
    adapted = attach_lora(model, rank=4, alpha=8)
    hidden_states(adapted, random_batch((9, 6))).sum().backward()
    assert (called.count("gate_up_proj"), called.count("down_proj")) == (3, 2)
    saved: list[Tensor] = []
    x = torch.randn(9, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        experts(x, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1))
    assert saved and max(tensor.numel() for tensor in saved) <= 9 * experts.gate_up_proj.shape[1]


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*MIXTURES, "gpt_oss"])
def test_loss_and_gradient_are_those_of_transformers_on_dequantized_weights(family: str, tmp_path: Path) -> None:
    """In fp32 and packed, against transformers' eager experts; the adapters' B is not zero, so that A learns too."""
    save_model(tmp_path, tiny_model(family, attention=None), tokenizer=False)
    check_config(str(tmp_path), device_type="cpu")
    batch = random_batch((9, 6, 5))
    found = []
    for model in (base_of(tmp_path), dequantized_copy(tmp_path)):
        check_head(model)
        targets = ("q_proj", "k_proj", "v_proj", "o_proj")
        adapted = attach_lora(model, rank=4, alpha=8, target_modules=targets)
        trained = trainable_parameters(adapted)
        assert trained and not any("expert" in name or "gate" in name for name in trained)
        with torch.no_grad():
            for name, weight in trained.items():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        hidden = hidden_states(adapted, batch)
        loss = (hidden * torch.linspace(-1, 1, hidden.shape[1])).sum() / hidden.numel()
        loss.backward()
        found.append((loss.detach(), {name: weight.grad for name, weight in trained.items()}, hidden.detach()))
    (ours, our_grads, our_hidden), (theirs, their_grads, their_hidden) = found
    torch.testing.assert_close(our_hidden, their_hidden, rtol=1e-5, atol=1e-5)
    assert abs(ours - theirs) <= 1e-5
    for name, grad in their_grads.items():
        assert grad is not None and (our_grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max().clamp_min(1.0), name


@torch.no_grad()
def test_packed_documents_are_as_if_alone(folder: Path) -> None:
    model = base_of(folder)
    batch = random_batch((9, 1, 6))
    together = hidden_states(model, batch)
    apart = torch.cat([hidden_states(model, one) for one in alone(batch)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize(("quantization", "double_quant"), KINDS)
def test_the_bytes_in_memory_are_those_that_the_shapes_promise(
    family: str, quantization: Any, double_quant: bool, tmp_path: Path
) -> None:
    save_model(tmp_path, tiny_model(family, attention=None), tokenizer=False)
    settings = {"double_quant": double_quant, "dtype": torch.float32}
    promised = promised_base_bytes(str(tmp_path), quantization=quantization, **settings)
    model = base_of(tmp_path, quantization, double_quant)
    # buffers that are no parameters (a correction of the router's scores) are not promised
    assert held_bytes(model) == promised.on_each_rank()
    assert sum(map(num_weights, model.parameters())) == sum(p.numel() for p in base_of(tmp_path, "none").parameters())
    with pytest.raises(RunFailed, match="the base is not quantized"):
        check_base_bytes([("a", held_bytes(base_of(tmp_path, "none")))], promised.on_each_rank(), "ddp")


def test_a_changed_bit_of_any_part_is_seen(folder: Path) -> None:
    model = base_of(folder)
    before = base_checksum(model)
    for part in ("codes", "absmax", "nested_absmax", "offset"):
        tensor = getattr(packed_experts(model)["model.layers.1.mlp.experts.down_proj"], part)
        tensor.view(-1).view(torch.uint8)[1] ^= 1
        assert base_checksum(model) != before, part
        tensor.view(-1).view(torch.uint8)[1] ^= 1
    assert base_checksum(model) == before


@pytest.mark.parametrize("part", ["codes", "absmax", "nested_absmax", "offset"])
def test_an_expert_that_differs_from_its_file_is_named(folder: Path, part: str) -> None:
    model = base_of(folder)
    said = check_source_bits(model, str(folder), compute_dtype=torch.float32, seed=1)
    assert said.endswith("expert 1 of model.layers.0.mlp.experts.gate_up_proj as well")
    changed = getattr(packed_experts(model)["model.layers.0.mlp.experts.gate_up_proj"], part)
    changed[1].view(torch.uint8)[0] ^= 1
    with pytest.raises(RunFailed, match=rf"expert 1 of model\.layers\.0\.mlp\.experts\.gate_up_proj: its {part} in"):
        check_source_bits(model, str(folder), compute_dtype=torch.float32, seed=1)


def test_a_nan_in_an_expert_is_found(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[next(key for key in sorted(weights) if re.search(r"\.experts\.(2\.|down_proj$)", key))][3, 3] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for double_quant in (True, False):
        with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts\..* has values that are NaN or infinite"):
            base_of(tmp_path, double_quant=double_quant)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "quantization", "message"),
    [
        ("gpt_oss", {}, "int8", r"which int8 does not cover; set model\.quantization=nf4 or none"),
        ("gpt_oss", {"intermediate_size": 96}, "nf4", r"down_proj has 96 inputs, not a multiple of the quantization"),
        ("mixtral", {}, "int8", r"which int8 does not cover; set model\.quantization=nf4 or none"),
        ("hunyuan_v1_moe", {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4}, "nf4", "is a linear layer"),
        ("phimoe", {"num_key_value_heads": 2, "num_local_experts": 4}, "nf4", "is a linear layer"),
        ("mixtral", {"intermediate_size": 96}, "nf4", r"has 96 inputs, not a multiple of the quantization block size"),
    ],
)  # fmt: skip
def test_experts_of_another_form_are_refused_with_the_reason(
    family: str, changes: dict[str, Any], quantization: Any, message: str, tmp_path: Path
) -> None:
    tiny_config(family, **changes).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        check_config(str(tmp_path), quantization=quantization, device_type="cpu")


# --- ranks ------------------------------------------------------------------------------------------------------------


def _sharded(folder: str) -> tuple[dict[str, bool], float, int, int, tuple[str, str]]:
    world, shards = world_and_shards()
    whole, sharded = load(folder, None), load(folder, shards)
    check_head(sharded)
    check_gathered_layer(sharded)
    check_sharding(sharded)
    with torch.no_grad():
        gap = float(
            (hidden_states(sharded, random_batch((9, 6))) - hidden_states(whole, random_batch((9, 6)))).abs().max()
        )
    expected, found = dict(base_weights(whole)), dict(base_weights(sharded))
    bits = {}
    for name in expected:
        if ".experts." in name:
            own = own_part(found[name])
            first = world.rank * len(own) if own is not found[name] else 0
            bits[name] = torch.equal(own, expected[name][first : first + len(own)])
    promised = promised_base_bytes(folder, quantization="nf4", double_quant=True, dtype=torch.bfloat16)
    held = held_bytes(sharded), promised.on_each_rank("fsdp", world.size)
    packed: Any = packed_experts(sharded)["model.layers.0.mlp.experts.down_proj"]
    own_part(packed.codes)[0, 0] ^= 1
    failure = outcome(check_gathered_layer, sharded)
    world.close()
    return bits, gap, *held, failure


def test_two_ranks_hold_half_of_the_experts_each_with_the_bits_of_one_process(folder: Path) -> None:
    for bits, gap, held, promised, (kind, text) in on_ranks(_sharded, 2, str(folder)):
        assert len(bits) > 16 and all(bits.values())
        assert gap == 0.0
        assert abs(held - promised) <= 64
        assert kind == "RunFailed" and "model.layers.0.mlp.experts.down_proj differs from its source" in text


def _uneven(folder: str) -> tuple[str, str]:
    world, shards = world_and_shards()
    found = outcome(load, folder, shards)
    world.close()
    return found


def test_experts_that_ranks_do_not_divide_are_refused_under_fsdp(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model("mixtral", attention=None, num_local_experts=3), tokenizer=False)
    for kind, text in on_ranks(_uneven, 2, str(tmp_path)):
        assert kind == "UserError" and "has 3 for 2 ranks; use a number of ranks that divides them" in text
