"""The decoder layer as three functions computes what transformers' layer with PEFT's adapters computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import random_batch, tiny_model
from torch import Tensor

from qlora_dist.model import hidden_states, set_recompute
from qlora_dist.model.decoder_block import use_decoder_blocks
from qlora_dist.model.forward import decoder_layers
from qlora_dist.model.lora import attach_lora, trainable_parameters

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral with windows": ("mistral", {}),
    "qwen2 with biases": ("qwen2", {}),
    "qwen3 with norms of heads": ("qwen3", {}),
    "granite with factors": ("granite", {}),
    "smollm3 with a layer without positions": ("smollm3", {
        "num_key_value_heads": 2, "no_rope_layers": [1, 0], "use_sliding_window": False, "num_hidden_layers": 2,
    }),
}  # fmt: skip


def adapted(family: str, targets: tuple[str, ...], dtype: torch.dtype, **changes: Any) -> torch.nn.Module:
    """A base with adapters that are not zero, with PEFT's own forward pass."""
    model = attach_lora(tiny_model(family, **changes), rank=4, alpha=8, target_modules=targets, kernels="off")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable_parameters(model).items():
        with torch.no_grad():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).train()


def outcome(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Hidden states, gradients of the adapters, and the gradient of the first layer's input."""
    batch = random_batch((9, 5, 6))
    inputs: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Tensor) -> Tensor:
        inputs.append(out.detach().requires_grad_())
        return inputs[0]

    handle = model.get_base_model().get_input_embeddings().register_forward_hook(keep)
    out = hidden_states(model, batch)
    handle.remove()
    model.zero_grad()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    assert all(grad is not None for grad in gradients.values()) and inputs[0].grad is not None
    return out.detach(), gradients, inputs[0].grad


def assert_equal_outcomes(found: Any, expected: Any, tolerance: float) -> None:
    for left, right in (
        (found[0], expected[0]), (found[2], expected[2]), *((found[1][name], expected[1][name]) for name in expected[1])
    ):  # fmt: skip
        assert right.abs().max() > 1e-3, "nothing is compared"
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance * float(right.abs().max()))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj"), ("o_proj",)])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_autograd_of_the_plain_layers_in_fp64(form, targets, recompute):
    family, changes = FORMS[form]
    model = adapted(family, targets, torch.float64, **changes)
    expected = outcome(model)
    assert use_decoder_blocks(model) == len(decoder_layers(model)) == 2
    set_recompute(model, recompute)
    # RMSNorm of transformers computes in fp32 whatever its input: relative errors of 2^-24, over a few layers
    assert_equal_outcomes(outcome(model), expected, 1e-5)
