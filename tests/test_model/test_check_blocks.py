"""A run finds out before its first step when a kernel of its decoder layers is wrong on its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch import Tensor

from qlora_dist.errors import RunFailed
from qlora_dist.model import check_blocks, decoder_block, products
from qlora_dist.model.forward import decoder_layers
from qlora_dist.model.lora import attach_lora, trainable_parameters

# the operation, where it is used, the place of what it writes among its arguments
OPERATIONS = [
    ("rms_norm", decoder_block, 3), ("rms_norm_backward", decoder_block, 5), ("rotate_heads", decoder_block, 8),
    ("rotate_heads_backward", decoder_block, 9), ("swiglu", decoder_block, 1), ("swiglu_backward", decoder_block, 0),
    ("swiglu_backward", decoder_block, 1), ("write_weight", products, 1), ("write_a", products, 1),
    ("write_b", products, 3),
]  # fmt: skip


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> torch.nn.Module:
    model = tiny_model(family, **changes).to(dtype)
    return attach_lora(model, rank=4, alpha=8, target_modules="all-linear").train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"])
def test_right_kernels_pass_and_nothing_is_changed(family, dtype):
    changes = {"no_rope_layers": [1, 0], "num_hidden_layers": 2} if family == "smollm3" else {}
    model = adapted(family, dtype, **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes, random_state = [type(one) for one in decoder_layers(model)], torch.get_rng_state()
    check_blocks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(one.grad is None for one in trainable_parameters(model).values())
    assert [type(one) for one in decoder_layers(model)] == classes
    assert all(hasattr(one, "plain_class") for one in classes)
    assert torch.equal(torch.get_rng_state(), random_state) and model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["a row is not written", "another sign", "not a number"])
@pytest.mark.parametrize(("name", "module", "written"), OPERATIONS)
def test_a_wrong_kernel_is_found(name, module, written, fault, dtype, monkeypatch):
    real: Callable[..., Any] = getattr(module, name)

    def wrong(*arguments: Any, **keywords: Any) -> None:
        out: Tensor = arguments[written]
        before = out[0].clone()
        real(*arguments, **keywords)
        if fault == "a row is not written":
            out[0] = before if name == "swiglu_backward" else 0
        elif fault == "another sign":
            out[:, ::5].neg_()
        else:
            out[0, 0] = float("nan")

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(RunFailed, match=r"kernels of a decoder layer give wrong results .* model\.kernels=reference"):
        check_blocks(adapted("qwen3", dtype))


def test_each_kind_of_layer_is_compared(monkeypatch):
    """SmolLM 3's layers without positions leave the rotary kernel without columns."""
    model = adapted("smollm3", no_rope_layers=[1, 0, 1], num_hidden_layers=3)
    compared = []
    real = decoder_block.read_block

    def read(layer: Any) -> Any:
        if torch.is_grad_enabled():  # the whole model, run to see how a layer is called, needs no gradient
            compared.append(layer)
        return real(layer)

    monkeypatch.setattr(decoder_block, "read_block", read)
    check_blocks(model)
    assert {id(one) for one in compared} == {id(one) for one in decoder_layers(model)[:2]}
