"""Packed attention: no document sees another, and every family computes what it computes for each document alone."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import FAMILIES, alone, random_batch, tiny_model

from qlora_dist.errors import UserError
from qlora_dist.model import attention, hidden_states
from qlora_dist.model.attention import AttentionNeeds, documents_of, packed_attention, resolve_backend

LENGTHS = (9, 1, 6, 12)
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_hidden_states_equal_each_document_alone_with_transformers_own_attention(family: str) -> None:
    batch = random_batch(LENGTHS)
    packed = hidden_states(tiny_model(family), batch)
    # eager is the plainest reference: full matrices, masks built by transformers
    reference = tiny_model(family, attention="eager")
    single = [reference.base_model(input_ids=one.input_ids).last_hidden_state[0] for one in alone(batch)]
    # fp32 sums in another order, through two layers
    torch.testing.assert_close(packed, torch.cat(single), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_changing_the_first_document_leaves_the_second_unchanged_and_leaks_would_show(family: str) -> None:
    model = tiny_model(family)
    one, other = random_batch((9, 7), seed=1), random_batch((9, 7), seed=2)
    other = dataclasses.replace(other, input_ids=torch.cat([other.input_ids[:, :9], one.input_ids[:, 9:]], dim=1))
    assert torch.equal(hidden_states(model, one)[9:], hidden_states(model, other)[9:])
    # the guard: as a single document with the same positions, the second half does depend on the first
    leaky = [
        dataclasses.replace(batch, lengths=(16,), cu_seqlens=torch.tensor([0, 16], dtype=torch.int32), max_seqlen=16)
        for batch in (one, other)
    ]
    gap = (hidden_states(model, leaky[0])[9:] - hidden_states(model, leaky[1])[9:]).abs().max()
    assert gap > 0.1


def _qkv(heads: int = 4, key_heads: int = 2, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, heads, sum(LENGTHS), width, generator=generator),
        torch.randn(1, key_heads, sum(LENGTHS), width, generator=generator),
        torch.randn(1, key_heads, sum(LENGTHS), width, generator=generator),
    )


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One (T, T) matrix of scores with an explicit mask, token by token."""
    document = [index for index, length in enumerate(LENGTHS) for _ in range(length)]
    size = len(document)
    allowed = torch.tensor(
        [
            [document[i] == document[j] and j <= i and (window is None or i - j < window) for j in range(size)]
            for i in range(size)
        ]
    )
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~allowed, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return (weights / total @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, *(length + i for length in (6, 12) for i in (-1, 0, 1))])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_windows_caps_sinks_and_scaling_equal_an_explicit_matrix(
    window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    q, k, v = _qkv()
    sinks = torch.linspace(-1, 2, 4) if has_sinks else None
    out, _ = packed_attention(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        scaling=0.7,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
        packed=documents_of(random_batch(LENGTHS), "sdpa"),
    )
    torch.testing.assert_close(out, _reference(q, k, v, 0.7, window, softcap, sinks), atol=1e-5, rtol=1e-5)  # fp32


@pytest.mark.parametrize("windows", [(3, 5), (5, 3), (None, 3), (3, None)])
def test_layers_of_one_batch_keep_their_own_windows(windows: tuple[int | None, int | None]) -> None:
    q, k, v = _qkv()
    documents = documents_of(random_batch(LENGTHS), "sdpa")  # the layers of a model share it
    for window in windows:
        out, _ = packed_attention(
            torch.nn.Module(), q, k, v, None, scaling=0.7, sliding_window=window, softcap=1.5, packed=documents
        )
        torch.testing.assert_close(out, _reference(q, k, v, 0.7, window, 1.5), atol=1e-5, rtol=1e-5)  # fp32


def test_gradients_stay_within_a_document() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in _qkv())
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, packed=documents_of(random_batch(LENGTHS), "sdpa"))
    out[:, LENGTHS[0] :].sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert torch.count_nonzero(tensor.grad[:, :, : LENGTHS[0]]) == 0
        assert torch.count_nonzero(tensor.grad[:, :, LENGTHS[0] + 1 :]) > 0


def test_calls_that_packing_does_not_support_are_rejected() -> None:
    q, k, v = _qkv()
    module, documents = torch.nn.Module(), documents_of(random_batch(LENGTHS), "sdpa")
    with pytest.raises(RuntimeError, match="without document boundaries"):
        packed_attention(module, q, k, v, None)
    with pytest.raises(RuntimeError, match="attention mask"):
        packed_attention(module, q, k, v, torch.ones(1), packed=documents)
    with pytest.raises(RuntimeError, match="non-causal"):
        packed_attention(module, q, k, v, None, is_causal=False, packed=documents)
    with pytest.raises(RuntimeError, match=r"attention dropout 0\.1"):
        packed_attention(module, q, k, v, None, dropout=0.1, packed=documents)


def test_cudnn_attention_is_disabled_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        attention.disable_cudnn_attention(CPU)
        assert torch.backends.cuda.cudnn_sdp_enabled(), "nothing to disable on a CPU"
        attention.disable_cudnn_attention(torch.device("cuda", 0))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_auto_on_a_cpu_is_sdpa_and_logs_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="qlora_dist.model.attention"):
        assert resolve_backend("auto", CPU) == "sdpa"
    assert "not flash: it needs a CUDA device" in caplog.text and "not varlen" in caplog.text


@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_a_requested_backend_that_cannot_be_used_is_rejected(name: str) -> None:
    with pytest.raises(UserError, match=f"model.attention is {name}.*needs a CUDA device.*sdpa"):
        resolve_backend(name, CPU)
    with pytest.raises(UserError, match="expected auto, flash, varlen, sdpa"):
        resolve_backend("eager", CPU)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (AttentionNeeds(dtype=torch.float32), "compute type is float32"),
        (AttentionNeeds(head_dim=512), "the model's is 512"),
        (AttentionNeeds(has_sinks=True), "sinks"),
        (AttentionNeeds(has_softcap=True), "caps its attention scores"),
    ],
)
def test_model_requirements_rule_out_kernels(needs: AttentionNeeds, reason: str) -> None:
    assert reason in attention._why_not("varlen", torch.device("cuda"), needs)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("known", [{"is_causal"}, {"scale", "window_size"}, {"scale", "window_size", "enable_gqa"}])
def test_varlen_calls_of_torch_2_10_to_2_13_are_equivalent(
    window: int | None, known: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernel cannot run here: a stand-in computes what its arguments are documented to mean."""
    needs = AttentionNeeds(head_dim=8, has_window=window is not None)
    monkeypatch.setattr(attention, "_varlen_keywords", lambda: frozenset(known))
    reason = attention._why_not("varlen", torch.device("cuda"), needs)
    assert bool(reason) == (window is not None and "window_size" not in known)
    if reason:
        return
    q, k, v = _qkv()

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **given):  # type: ignore[no-untyped-def]
        assert given.keys() <= known and max_q == max_k == max(LENGTHS)
        # grouped heads unexpanded, with the keyword where it exists: expanded, they would be saved for every layer
        assert (q.shape[1], k.shape[1], v.shape[1]) == (4, 2, 2)
        assert given.get("enable_gqa", False) == ("enable_gqa" in known)
        left, right = given.get("window_size", (-1, 0 if given.get("is_causal") else -1))
        assert right == 0
        parts = []
        for start, stop in zip(cu_q[:-1].tolist(), cu_q[1:].tolist()):
            position = torch.arange(stop - start)
            distance = position[:, None] - position[None]
            mask = (distance >= 0) & ((distance <= left) | (left < 0))
            one = (tensor[start:stop].transpose(0, 1)[None] for tensor in (q, k, v))
            out = F.scaled_dot_product_attention(*one, attn_mask=mask, scale=given.get("scale"), enable_gqa=True)
            parts.append(out[0])
        return torch.cat(parts, dim=1).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    documents = documents_of(random_batch(LENGTHS), "varlen")
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, scaling=0.7, sliding_window=window, packed=documents)
    torch.testing.assert_close(out, _reference(q, k, v, 0.7, window), atol=1e-5, rtol=1e-5)  # fp32 sums


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_values_narrower_than_queries_come_back_in_their_own_width(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latent attention: the kernels take one width, so the values are padded, and the output is cut again."""
    q, k, v = _qkv()
    v = v[..., :5]

    def kernel(q, k, v, *_: object, **given: object):  # type: ignore[no-untyped-def]
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        return _reference(*(tensor.transpose(0, 1)[None] for tensor in (q, k, v)), 0.7)[0]

    module = SimpleNamespace(__name__="flash_attn", flash_attn_varlen_func=kernel)
    monkeypatch.setattr(attention, "_flash_module", lambda device, is_plain: module)
    monkeypatch.setattr(attention, "_varlen_keywords", lambda: frozenset({"scale", "window_size", "enable_gqa"}))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    documents = documents_of(random_batch(LENGTHS), backend)
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, scaling=0.7, packed=documents)
    assert out.shape[-1] == 5
    torch.testing.assert_close(out, _reference(q, k, v, 0.7), atol=1e-5, rtol=1e-5)  # fp32 sums


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("version", [2, 4])
def test_flash_attention_calls_of_versions_2_and_4_are_equivalent(
    window: int | None, softcap: float | None, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in again, with the arguments that flash-attn 2 and 4 document; 4 returns a pair."""
    q, k, v = _qkv()

    def kernel(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
               window_size, softcap=0.0):  # type: ignore[no-untyped-def]  # fmt: skip
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == max(LENGTHS)
        unbounded = None if version == 4 else -1
        left, right = window_size
        assert (left, right) == (unbounded, unbounded) or right == 0
        size = None if left == unbounded else left + 1
        batch_first = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = _reference(*batch_first, softmax_scale, size, softcap or None)[0]
        return (out, None) if version == 4 else out

    name = "flash_attn.cute" if version == 4 else "flash_attn"
    module = SimpleNamespace(__name__=name, flash_attn_varlen_func=kernel)
    monkeypatch.setattr(attention, "_flash_module", lambda device, is_plain: module)
    documents = documents_of(random_batch(LENGTHS), "flash")
    out, _ = packed_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.7, sliding_window=window, softcap=softcap, packed=documents
    )
    torch.testing.assert_close(out, _reference(q, k, v, 0.7, window, softcap), atol=1e-5, rtol=1e-5)  # fp32 sums


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash", "varlen"])
@pytest.mark.parametrize("window", [None, 5])
def test_kernels_equal_sdpa_with_gradients(backend: str, window: int | None) -> None:
    device = torch.device("cuda")
    reason = attention._why_not(backend, device, AttentionNeeds(head_dim=64))
    if reason:
        pytest.skip(reason)
    attention.disable_cudnn_attention(torch.device("cuda", 0))  # as in training
    results = []
    for name in (backend, "sdpa"):
        q, k, v = (x.to(device, torch.bfloat16).requires_grad_() for x in _qkv(width=64))
        documents = documents_of(random_batch(LENGTHS).to(device), name)
        out, _ = packed_attention(
            torch.nn.Module(), q, k, v, None, scaling=0.1, sliding_window=window, packed=documents
        )
        out.float().square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for left, right in zip(*results):
        torch.testing.assert_close(left, right, atol=0.05, rtol=0.05)  # bf16 keeps 8 bits
