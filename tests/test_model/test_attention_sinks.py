"""Attention with sinks by a flash kernel without: the formulas on torch's kernel for CPUs, and the check before use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import alone, random_batch, tiny_model
from torch import Tensor

from qlora_dist.model import attention_sinks, hidden_states
from qlora_dist.model.attention import documents_of, packed_attention
from qlora_dist.model.attention_sinks import flash_with_sinks, largest_gap, plain_math, why_not

CPU, LENGTHS = torch.device("cpu"), (9, 1, 6, 12)


def _mask(length: int, left: int, dtype: torch.dtype) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    is_seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
    return torch.zeros(length, length, dtype=dtype).masked_fill(~is_seen, -torch.inf)


def _parts(starts: Tensor, *tensors: Tensor) -> Any:
    """Each document's (1, H, L, D), grouped heads repeated."""
    lengths = starts.diff().tolist()
    heads = tensors[0].shape[1]
    wide = (one.repeat_interleave(heads // one.shape[1], 1) for one in tensors)
    return zip(*(one.transpose(0, 1)[None].split(lengths, dim=2) for one in wide), strict=True)


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, left: int) -> Any:
    assert longest == int(starts.diff().max())
    pairs = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *one, 0.0, False, attn_mask=_mask(one[0].shape[2], left, q.dtype), scale=scale
        )
        for one in _parts(starts, q, k, v)
    ]
    out = torch.cat([out[0].transpose(0, 1) for out, _ in pairs])
    return out, torch.cat([lse.view(q.shape[1], -1) for _, lse in pairs], dim=1)


def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, longest: int, scale: float,
    left: int,
) -> Any:  # fmt: skip
    found = []
    own = lse.split(starts.diff().tolist(), dim=1)
    for (g, *inputs, result), sums in zip(_parts(starts, grad, q, k, v, out), own, strict=True):
        mask = _mask(result.shape[2], left, q.dtype)
        found.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(one.contiguous() for one in (g, *inputs, result)), sums[None].contiguous(), 0.0, False,
                attn_mask=mask, scale=scale,
            )
        )  # fmt: skip
    wide = [torch.cat([one[0].transpose(0, 1) for one in column]) for column in zip(*found, strict=True)]
    groups = q.shape[1] // k.shape[1]
    return wide[0], *(one.unflatten(1, (k.shape[1], groups)).sum(2) for one in wide[1:])


@pytest.fixture
def cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_sinks, "flash_forward", cpu_forward)
    monkeypatch.setattr(attention_sinks, "flash_backward", cpu_backward)
    why_not.cache_clear()


@pytest.mark.parametrize("left", [-1, 0, 5])
@pytest.mark.usefixtures("cpu_kernel")
def test_results_and_all_gradients_are_those_of_plain_math(left: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 8) for heads in (4, 2, 2, 4)]
    *drawn, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    found = []
    for is_plain in (False, True):
        inputs = [one.clone().requires_grad_() for one in (*drawn, torch.linspace(-1, 3, 4, dtype=torch.float64))]
        if is_plain:
            out = plain_math(*inputs, LENGTHS, 0.7, left)
        else:
            out = flash_with_sinks(*inputs, starts, max(LENGTHS), 0.7, left)
        found.append([out, *torch.autograd.grad(out, inputs, grad)])
    for ours, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)  # sinks and log-sum-exp are fp32


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.usefixtures("cpu_kernel")
def test_the_backend_varlen_gives_what_sdpa_gives(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8, generator=generator) for heads in (4, 2, 2))
    results = [
        packed_attention(
            torch.nn.Module(), q, k, v, None, sliding_window=window, s_aux=torch.linspace(-1, 2, 4),
            packed=documents_of(random_batch(LENGTHS), backend),
        )[0]
        for backend in ("varlen", "sdpa")
    ]  # fmt: skip
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gpt_oss_packed_is_each_document_alone_by_transformers_eager_attention() -> None:
    batch = random_batch(LENGTHS)
    packed = hidden_states(tiny_model("gpt_oss"), batch)
    reference = tiny_model("gpt_oss", attention="eager")
    single = torch.cat([reference.base_model(input_ids=one.input_ids).last_hidden_state[0] for one in alone(batch)])
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-5)
    for layer in reference.base_model.layers:  # the guard: sinks and windows matter
        layer.self_attn.sinks.fill_(-100.0)
    without = torch.cat([reference.base_model(input_ids=one.input_ids).last_hidden_state[0] for one in alone(batch)])
    assert (without - single).abs().max() > 0.1


@pytest.mark.usefixtures("cpu_kernel")
def test_a_kernel_is_used_only_if_it_passes_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_gap(CPU, torch.float32, 16) < 1e-5
    assert why_not(CPU, torch.bfloat16, 16) == ""
    for name, wrong in (
        ("flash_forward", lambda *given: (cpu_forward(*given)[0], cpu_forward(*given)[1] + 1.0)),
        ("flash_backward", lambda *given: tuple(1.2 * one for one in cpu_backward(*given))),
        ("flash_forward", lambda *given: (cpu_forward(*given)[0] * torch.nan, cpu_forward(*given)[1])),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(attention_sinks, name, wrong)
            why_not.cache_clear()
            assert "its result with attention sinks is wrong here, by up to" in why_not(CPU, torch.bfloat16, 16)
    why_not.cache_clear()


def test_a_kernel_that_cannot_run_is_not_used() -> None:
    why_not.cache_clear()
    assert "could not be checked here" in why_not(CPU, torch.bfloat16, 16)
    why_not.cache_clear()
