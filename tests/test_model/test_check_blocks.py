"""A run finds out before its first step when a kernel of its decoder layers is wrong on its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch import Tensor

from qlora_dist.errors import RunFailed
from qlora_dist.model import check_blocks, decoder_block, gate_gradients, products, raised_gradients
from qlora_dist.model.forward import decoder_layers
from qlora_dist.model.lora import attach_lora, trainable_parameters

# the operation, where it is used, the place of what it writes among its arguments
OPERATIONS = [
    ("norm_lower", products, 4), ("norm_lower", products, 5), ("norm_lower", products, 6),
    ("rms_norm_backward", decoder_block, 5), ("raised_products", raised_gradients, 5),
    ("raised_products", raised_gradients, 6), ("sum_parts", raised_gradients, 3), ("sum_parts", raised_gradients, 4),
    ("rotate_heads", decoder_block, 8), ("rotate_heads_backward", decoder_block, 9), ("swiglu_lower", decoder_block, 2),
    ("swiglu_lower", decoder_block, 3), ("copy_lower", decoder_block, 2), ("copy_lower", decoder_block, 3),
    ("swiglu_backward_products", gate_gradients, 5), ("swiglu_backward_products", gate_gradients, 6),
    ("swiglu_backward_products", gate_gradients, 7), ("sum_parts", gate_gradients, 3), ("sum_parts", gate_gradients, 4),
    ("write_weight", products, 1), ("write_a", products, 1), ("write_b", products, 3),
]  # fmt: skip
# those of ranks that are too large for products inside of a kernel
SEPARATE = [
    ("swiglu", decoder_block, 1), ("swiglu_backward", decoder_block, 0), ("swiglu_backward", decoder_block, 1),
    ("rms_norm", products, 3), ("rms_norm", products, 4),
]  # fmt: skip
LARGE = 80
# of which only sums over all tokens are compared, or that write a matrix of which one row hardly shows
SUMMED = ("copy_lower", "sum_parts", "write_b")
# In a tiny model the gradient through the adapters of gate and up is nothing beside that of the residual
WIDE = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1}


def adapted(
    family: str = "llama", dtype: torch.dtype = torch.float32, rank: int = 4, **changes: Any
) -> torch.nn.Module:
    model = tiny_model(family, **changes).to(dtype)
    return attach_lora(model, rank=rank, alpha=8, target_modules="all-linear").train()


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
    assert not any(one._forward_pre_hooks or one._forward_hooks for one in decoder_layers(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["rows are not written", "another sign", "not a number"])
@pytest.mark.parametrize(
    ("name", "module", "written", "rank"), [(*one, 4) for one in OPERATIONS] + [(*one, LARGE) for one in SEPARATE]
)
def test_a_wrong_kernel_is_found(name, module, written, rank, fault, dtype, monkeypatch):
    real: Callable[..., Any] = getattr(module, name)

    def wrong(*arguments: Any, **keywords: Any) -> None:
        out: Tensor | None = arguments[written]
        if out is None:  # without gradients
            return real(*arguments, **keywords)
        before = out.clone()
        real(*arguments, **keywords)
        if fault == "rows are not written":
            rows = slice(1 if name not in SUMMED else len(out) // 2 + 1)
            out[rows] = before[rows] if name.startswith("swiglu_backward") and written < 6 else 0
        elif fault == "another sign":
            out[..., :: 5 if name not in SUMMED else 1].neg_()
        else:
            out[(0,) * out.ndim] = float("nan")

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(RunFailed, match=r"kernels of a decoder layer give wrong results .* model\.kernels=reference"):
        check_blocks(adapted("qwen3", dtype, rank, **(WIDE if (name, written) == ("sum_parts", 4) else {})))


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
