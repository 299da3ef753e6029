"""The recompute ladder and the offload of activations change memory and time, and not one bit of a gradient."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_batch, save_model, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dist.adapters import attach_lora, trainable_parameters
from qlora_dist.model import hidden_states, load_base, set_recompute

NUM_LAYERS = 3
LEVELS: tuple[Any, ...] = ("none", 1, 2, "full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("base"), tiny_model(attention=None, num_hidden_layers=NUM_LAYERS), tokenizer=False
    )


def nf4_lora(folder: Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16, kernels: Any = "auto") -> Any:
    base = load_base(
        str(folder),
        quantization="nf4",
        double_quant=True,
        compute_dtype=dtype,
        attention="auto",
        device=torch.device("cpu"),
    )
    model = attach_lora(base, rank=4, alpha=8, dropout=dropout, kernels=kernels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


class CountOps(TorchDispatchMode):
    """Counts the operators that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def forward_backward(model: Any) -> tuple[Counter[str], dict[str, torch.Tensor]]:
    """Operators of the backward pass, and every gradient."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = hidden_states(model, random_batch((9, 5))).float().square().mean()
    with CountOps() as counted:
        loss.backward()
    gradients = {}
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    return counted.calls, gradients


def require_equal_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and any(gradient.any() for gradient in left.values())
    for name, gradient in left.items():
        assert torch.equal(gradient, right[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_recompute_level_gives_the_same_bits(folder: Path, dropout: float, dtype: torch.dtype) -> None:
    model = nf4_lora(folder, dropout=dropout, dtype=dtype)
    found = {}
    for level in LEVELS:
        set_recompute(model, level)
        calls, found[level] = forward_backward(model)
        num_recomputed = {"none": 0, "full": NUM_LAYERS}.get(level, level)
        assert calls["bitsandbytes::gemm_4bit"] == 6 * num_recomputed  # it did recompute as much as it was told to
    for level in LEVELS[1:]:
        require_equal_bits(found["none"], found[level])


def test_dropout_is_in_these_gradients(folder: Path) -> None:
    """Without this the test above could pass with dropout that does nothing."""
    model = nf4_lora(folder, dropout=0.3)
    set_recompute(model, "full")
    _, dropped = forward_backward(model)
    _, whole = forward_backward(nf4_lora(folder))
    assert any(not torch.equal(gradient, whole[name]) for name, gradient in dropped.items())


def test_a_recomputed_layer_never_multiplies_its_last_linear_again(folder: Path) -> None:
    """Of seven products with the base per layer, recomputation makes six; with PEFT's own forward all seven."""
    calls = {}
    for kernels in ("auto", "off"):
        model = nf4_lora(folder, dtype=torch.float32, kernels=kernels)
        set_recompute(model, "full")
        calls[kernels], _ = forward_backward(model)
        # the gradient with respect to the input needs each weight once more, whatever is recomputed
        assert calls[kernels]["bitsandbytes::dequantize_4bit"] >= 7 * (NUM_LAYERS - 1)
    assert calls["auto"]["bitsandbytes::gemm_4bit"] == 6 * NUM_LAYERS
    assert calls["off"]["bitsandbytes::gemm_4bit"] == 7 * NUM_LAYERS


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_on_other_bases_the_levels_agree_too(family: str, quantization: Any, tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(family, attention=None), tokenizer=False)
    base = load_base(
        str(tmp_path),
        quantization=quantization,
        double_quant=False,
        compute_dtype=torch.bfloat16,
        attention="auto",
        device=torch.device("cpu"),
    )
    model = attach_lora(base, rank=4, alpha=8, dropout=0.2).train()
    found = []
    for level in ("none", "full"):
        set_recompute(model, level)
        found.append(forward_backward(model)[1])
    require_equal_bits(*found)
