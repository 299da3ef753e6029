"""Layers with state on packed rows: the result of each document alone, by transformers' own code; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import HYBRIDS, alone, random_batch, save_model, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_dist.data.packing import Batch
from qlora_dist.errors import UserError
from qlora_dist.model import (
    check_config,
    check_head,
    hidden_states,
    is_4bit,
    linear_layers,
    load_base,
    output_head,
    quantized_and_back,
    set_recompute,
    state_layers,
)
from qlora_dist.model.attention import PackedDocuments
from qlora_dist.model.bitsandbytes_import import bitsandbytes
from qlora_dist.model.check_config import build_on_meta
from qlora_dist.model.lora import attach_lora, lora_layers
from qlora_dist.model.loss import nll_sum
from qlora_dist.model.state_layers import num_apart, separate_documents, state_mixers

CPU = torch.device("cpu")
LENGTHS = (70, 66, 5, 130, 5)  # longer than a chunk and shorter than a convolution's kernel, in two groups and alone
BATCH = random_batch(LENGTHS)


@pytest.fixture(scope="module", params=HYBRIDS)
def family(request: Any) -> str:
    try:
        tiny_config(request.param)
    except (ValueError, KeyError) as error:
        pytest.skip(f"this transformers has no {request.param}: {error}")
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: Any) -> Path:
    return save_model(tmp_path_factory.mktemp(family), tiny_model(family, attention=None))


def base_of(folder: Path, quantization: Any = "nf4", **changes: Any) -> Any:
    settings = {"compute_dtype": torch.float32, "attention": "sdpa", "device": CPU, "double_quant": True, **changes}
    return load_base(str(folder), quantization=quantization, **settings)


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    return nll_sum(hidden_states(model, batch), output_head(model), batch.label_positions, batch.labels)


def their_loss(model: Any, batch: Batch) -> torch.Tensor:
    """By transformers' own code, one document after another."""
    losses = []
    for one in alone(batch):
        logits = model(input_ids=one.input_ids, use_cache=False).logits[0]
        losses.append(nn.functional.cross_entropy(logits[:-1], one.input_ids[0, 1:], reduction="sum"))
    return torch.stack(losses).sum()


def gradients_of(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: value for name, value in zip(weights, found, strict=True) if value is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 8
    for name, value in expected.items():
        # fp32: the sums are those of one document, in another order
        assert (found[name] - value).norm() <= tolerance * value.norm().clamp_min(1e-6), name


# --- packed = alone ---------------------------------------------------------------------------------------------------


def test_loss_and_gradients_of_packed_documents_are_those_of_transformers_for_each_alone(
    family: str, folder: Path
) -> None:
    ours = base_of(folder, "none").requires_grad_(True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss, expected = loss_of(ours, BATCH), their_loss(theirs, BATCH)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients_of(loss, ours), gradients_of(expected, theirs), 2e-5)
    # not vacuous: by the same code without borders, the first document reaches the others
    row = torch.cat([one.input_ids for one in alone(BATCH)], dim=1)
    leaking = theirs(input_ids=row, position_ids=BATCH.position_ids, use_cache=False).logits[0]
    apart = torch.cat([theirs(input_ids=one.input_ids, use_cache=False).logits[0] for one in alone(BATCH)])
    assert (leaking - apart)[70:].abs().max() > 0.01
    assert num_apart(ours) >= 1 and len(state_mixers(ours)) in (1, 2)


def test_recomputed_layers_give_the_same_gradients_bit_for_bit(folder: Path) -> None:
    model = base_of(folder, "none").requires_grad_(True).train()
    kept = gradients_of(loss_of(model, BATCH), model)
    set_recompute(model, "full")
    recomputed = gradients_of(loss_of(model, BATCH), model)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_adapters_over_4_bits_train_as_over_dequantized_weights_by_peft_alone(family: str, folder: Path) -> None:
    """Codes are those of bitsandbytes; weights that are not linear keep their bits."""
    plain = dict(base_of(folder, "none").named_parameters())
    base = base_of(folder)
    four_bit = {name for name, module in linear_layers(base).items() if is_4bit(module)}
    assert four_bit == set(linear_layers(base))
    for name, value in base.named_parameters():
        if name.removesuffix(".weight") in four_bit:
            codes, state = bitsandbytes.functional.quantize_4bit(
                plain[name].detach(), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            assert torch.equal(value.data, codes) and torch.equal(value.quant_state.absmax, state.absmax)
        elif "experts" not in name:
            assert torch.equal(value, plain[name]) and not value.requires_grad, name
    ours = _adapted(base)
    check_head(ours)
    theirs = base_of(folder, "none")
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if name.removesuffix(".weight") in four_bit or (value.ndim == 3 and "experts" in name):
                for matrix in value if value.ndim == 3 else value[None]:
                    matrix.copy_(quantized_and_back(matrix, "nf4", True, torch.float32))
    theirs = _adapted(theirs, kernels="off")
    found = [gradients_of(loss_of(model, BATCH), model) for model in (ours, theirs)]
    assert_close(*found, 1e-4)
    mixers = state_mixers(base)
    inside = [name for name in lora_layers(ours) if any(name.startswith(f"{mixer}.") for mixer in mixers)]
    assert inside, "no projection of a layer with state has an adapter"


def _adapted(model: Any, **changes: Any) -> Any:
    adapted = attach_lora(model, rank=4, alpha=8, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return adapted


def test_the_config_alone_admits_the_family(family: str, folder: Path) -> None:
    facts = check_config(str(folder), device_type="cpu")
    assert facts.num_parameters == sum(value.numel() for value in base_of(folder, "none").parameters())


# --- groups of documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ((5, 6, 64, 65, 100), ((2, 6), (1, 64), (2, 100))),
        ((70, 70), ((2, 70),)),
        ((3, 200, 4, 1, 220), ((1, 1), (2, 4), (2, 220))),
    ],
)
def test_documents_of_like_length_share_a_call(lengths: tuple[int, ...], groups: Any) -> None:
    found, order, inverse = state_layers._grouped(lengths)
    assert found == groups
    if order is None or inverse is None:
        assert len(set(lengths)) == 1
    else:
        assert torch.equal(order[inverse], torch.arange(sum(lengths)))
        assert len(order) < 2 * sum(lengths)


@pytest.mark.parametrize("lengths", [(9,), (3, 3, 3), (1, 2, 65, 64, 1)])
def test_rows_of_any_documents_are_exact(lengths: tuple[int, ...]) -> None:
    model = tiny_model("lfm2")
    separate_documents(model)
    batch = random_batch(lengths)
    packed = hidden_states(model, batch)
    apart = torch.cat([hidden_states(model, one) for one in alone(batch)])
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)


# --- kernels ----------------------------------------------------------------------------------------------------------


def _convolution(x: torch.Tensor, weight: torch.Tensor, seq_idx: torch.Tensor | None = None, **_: Any) -> Any:
    """A kernel that honours borders, in plain torch: token t sees token t - k where both have the same number."""
    tokens = x.shape[-1]
    taps = weight.shape[-1]
    result = x * weight[:, -1:]
    for back in range(1, taps):
        same = torch.ones(tokens - back) if seq_idx is None else (seq_idx[0, back:] == seq_idx[0, :-back]).float()
        moved = nn.functional.pad(x[:, :, :-back] * same, (back, 0))
        result = result + moved * weight[:, -1 - back, None]
    return result


def _without_borders(x: torch.Tensor, weight: torch.Tensor, seq_idx: Any = None, **_: Any) -> Any:
    return _convolution(x, weight)


def _wrong_backward(x: torch.Tensor, weight: torch.Tensor, seq_idx: Any = None, **_: Any) -> Any:
    result = _convolution(x, weight, seq_idx)
    return result if seq_idx is None else result.detach() + x - x.detach()


def _missing(x: torch.Tensor, weight: torch.Tensor, **keywords: Any) -> Any:
    if keywords.get("seq_idx") is not None:
        raise ValueError("cannot keep packed sequences apart")
    return _convolution(x, weight)


@pytest.mark.parametrize(
    ("function", "is_used"),
    [(_convolution, True), (_without_borders, False), (_wrong_backward, False), (_missing, False)],
)
def test_a_kernel_is_used_when_it_gave_what_documents_alone_give(
    function: Any, is_used: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As on CUDA: the decision is made with the kernel's own result, forward and backward."""
    caplog.set_level("INFO", logger="qlora_dist")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((1, 8, 12), (8, 3)))
    documents = PackedDocuments("sdpa", (7, 5), torch.tensor([0, 7, 12], dtype=torch.int32), 7)
    apart = state_layers._Apart(function, "causal_conv1d_fn", nn.Module(), state_layers._Current(documents))
    assert apart._is_kernel_exact((x, weight), {}, documents) is is_used
    assert ("one kernel" in caplog.text) is is_used
    apart.current.has_kernel["causal_conv1d_fn"] = is_used
    expected = torch.cat([_convolution(part, weight) for part in x.split([7, 5], dim=2)], dim=2)
    torch.testing.assert_close(apart(x, weight), expected)


def test_a_kernel_that_reads_a_projection_is_passed_over() -> None:
    """mamba-ssm's kernel for a whole mixer would read codes as weights, and pass over the adapter."""
    mixer = nn.Module()
    mixer.out_proj = nn.Linear(4, 4)
    apart = state_layers._Apart(lambda *_: "fused", "split_conv1d_scan", mixer, state_layers._Current())
    assert apart(torch.zeros(1, 3, 4), mixer.out_proj.weight) is None


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_model_whose_state_passes_into_the_next_document_is_refused_when_it_is_loaded() -> None:
    model = tiny_model("qwen3_5_text")
    with pytest.raises(UserError, match="lets a packed document see the one before it"):
        check_head(model)
    separate_documents(model)
    check_head(model)
    mixer = next(iter(state_mixers(model).values()))
    whole = mixer.forward

    def leaking(hidden: torch.Tensor | None = None, **keywords: Any) -> torch.Tensor:
        """State that no short document reveals: what came 60 tokens before."""
        x = keywords.pop("hidden_states", hidden)
        return whole(hidden_states=x, **keywords) + 0.1 * nn.functional.pad(x, (0, 0, 60, 0))[:, : x.shape[1]]

    mixer.forward = leaking
    with pytest.raises(UserError, match="state of a layer pass from a packed document into the next"):
        check_head(model)


def test_a_fused_path_in_training_is_refused() -> None:
    model = tiny_model("lfm2")
    separate_documents(model)
    mixer = next(iter(state_mixers(model).values()))
    whole = mixer.forward
    mixer.forward = lambda **keywords: whole(**keywords) * (1.1 if mixer.training else 1.0)
    with pytest.raises(UserError, match="computes otherwise in training than in evaluation"):
        check_head(model)


def test_a_projection_that_is_not_called_as_a_module_is_refused() -> None:
    model = tiny_model("lfm2")
    separate_documents(model)
    mixer = next(iter(state_mixers(model).values()))
    mixer.out_proj.forward, mixer.forward = None, lambda hidden_states, **_: hidden_states @ mixer.out_proj.weight.t()
    with pytest.raises(UserError, match=r"layers\.0\.conv\.\w+ is not called as a module .* works neither in 4 bits"):
        check_head(model)


@pytest.mark.parametrize("family", ["jamba", "falcon_mamba", "minimax"])
def test_layers_whose_functions_are_not_known_are_refused_by_their_config(family: str, tmp_path: Path) -> None:
    tiny_config(family, num_key_value_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be trained|carry state|packed rows|is not called as a module"):
        check_config(str(tmp_path), weights="random", quantization="none")


@pytest.mark.parametrize("family", ["falcon_h1", "nemotron_h"])
def test_a_projection_that_peft_refuses_is_left_out_and_named(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    adapted = lora_layers(attach_lora(tiny_model(family), rank=2, alpha=2))
    assert adapted and not any(name.endswith(".out_proj") for name in adapted)
    with pytest.raises(UserError, match=rf"\.out_proj .* PEFT does not adapt in {family}"):
        check_config(str(tmp_path), weights="random", target_modules=("in_proj", "out_proj"))


def test_a_class_keeps_its_own_forward_pass() -> None:
    """Only the loaded model computes documents apart; the class, and models for generation, are transformers'."""
    config = tiny_config("lfm2")
    model, other = tiny_model("lfm2"), build_on_meta("lfm2", config)
    separate_documents(model)
    assert "forward" in vars(next(iter(state_mixers(model).values())))
    assert not any("forward" in vars(mixer) for mixer in state_mixers(other).values())
    with pytest.raises(RuntimeError, match="was called without document boundaries"):
        next(iter(state_mixers(model).values()))(hidden_states=torch.zeros(1, 3, 64))
