"""Packed attention: many documents in one row, none of which sees another.

    query (1, Hq, T, D), key and value (1, Hkv, T, D), document boundaries  ->  (1, T, Hq, D)

One attention function is registered with transformers under the name PACKED. It reads the document boundaries from the
keyword `packed`, which `model.hidden_states` passes to every layer, so they are computed once per batch, never derived
from position ids on the device, and available again when a checkpointed layer is recomputed. No mask function is
registered for PACKED: transformers then builds no mask at all, and what a mask would express (causality, sliding
window) comes from the documents and the layer's own keywords.

Backends, all with the same result:
    flash   flash-attn, fp16 and bf16; the cute kernels of flash-attn 4 on Hopper and later when they are installed
    varlen  torch.nn.attention.varlen on CUDA, fp16 and bf16, no softcap; sinks by `attention_sinks`
    sdpa    one scaled_dot_product_attention call per document, any device and type; softcap and sinks by plain math

Without `packed` (generation with a cache, padded batches) the function raises instead of guessing: a model for
inference is loaded with transformers' own "sdpa" attention (`model.INFERENCE`).

Only this file imports flash_attn. It imports transformers only to register its attention functions.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.packing import Batch
from ..errors import UserError
from .attention_sinks import flash_with_sinks
from .attention_sinks import why_not as sinks_cannot

log = logging.getLogger(__name__)

PACKED = "qlora_dist_packed"  # no "flash" or "sdpa" in it: transformers gives these substrings a meaning
PROBE = "qlora_dist_probe"
BACKENDS = ("flash", "varlen", "sdpa")
LARGEST_HEAD = 256  # largest head dimension of the flash kernels


@dataclass(frozen=True)
class PackedDocuments:
    """Document boundaries of one batch, in the forms that the backends need. Built by `documents_of`."""

    backend: str  # flash, varlen or sdpa
    lengths: tuple[int, ...]  # of the documents, on the host
    cu_seqlens: Tensor  # (D + 1,) int32, on the device
    max_seqlen: int
    windows: dict[Any, Tensor] = field(default_factory=dict, compare=False)  # masks of this batch, shared by layers


def documents_of(batch: Batch, backend: str) -> PackedDocuments:
    """The keyword `packed` for one batch."""
    return PackedDocuments(backend, batch.lengths, batch.cu_seqlens, batch.max_seqlen)


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model requires of an attention backend."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    has_softcap: bool = False
    has_window: bool = False
    has_sinks: bool = False


def resolve_backend(requested: str, device: torch.device, needs: AttentionNeeds | None = None) -> str:
    """`auto` -> the first of flash, varlen, sdpa that supports this device and model. Logs which, and why.

    Raises UserError when a backend requested by name cannot be used.
    """
    needs = needs or AttentionNeeds()
    if requested != "auto" and requested not in BACKENDS:
        raise UserError(f"model.attention is {requested!r}; expected auto, {', '.join(BACKENDS)}")
    reasons = {name: _why_not(name, device, needs) for name in BACKENDS}
    if requested != "auto":
        if reasons[requested]:
            raise UserError(
                f"model.attention is {requested}, which cannot be used here: {reasons[requested]}. "
                "Set model.attention=auto, or sdpa, which always works"
            )
        return requested
    chosen = next(name for name in BACKENDS if not reasons[name])
    passed_over = "; ".join(f"not {name}: {reasons[name]}" for name in BACKENDS[: BACKENDS.index(chosen)])
    log.info("attention: %s%s", chosen, f" ({passed_over})" if passed_over else "")
    return chosen


def disable_cudnn_attention(device: torch.device) -> None:
    """Keeps scaled_dot_product_attention in this process from using cuDNN, which torch prefers on Hopper.

    cuDNN builds a plan for each new shape, and here every document (in generation, every token) has its own length.
    """
    if device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)
        log.info("attention: cuDNN is disabled: it builds a plan for every document length")


def _why_not(backend: str, device: torch.device, needs: AttentionNeeds) -> str:
    """Why a backend cannot be used; empty if it can."""
    if backend == "sdpa":
        return ""
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"it supports float16 and bfloat16, the compute type is {str(needs.dtype).removeprefix('torch.')}"
    if needs.head_dim > LARGEST_HEAD or needs.head_dim % 8:
        return f"it supports multiples of 8 up to {LARGEST_HEAD} as head dimension, the model's is {needs.head_dim}"
    if backend == "flash" and needs.has_sinks:
        return "the model has attention sinks, which it does not support"
    if backend == "varlen":
        if needs.has_softcap:
            return "the model caps its attention scores, which it does not support"
        if needs.has_window and "window_size" not in _varlen_keywords():
            return "the model has sliding windows, which this torch's varlen attention does not support"
        if needs.has_sinks and (reason := sinks_cannot(device, needs.dtype, needs.head_dim)):
            return reason
        return "" if _varlen_keywords() else "this torch has no torch.nn.attention.varlen"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash-attn needs compute capability 8.0 (Ampere)"
    if _flash_module(device, not needs.has_softcap and not needs.has_window) is None:
        return "flash-attn is not installed (pip install 'qlora-dist[flash]')"
    return ""


# --- the registered function ------------------------------------------------------------------------------------------


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, Dv)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    packed: PackedDocuments | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; (1, T, Hq, Dv). Called by every attention layer of the model.

    `sliding_window` counts the token itself, as in transformers. `s_aux` (Hq,) are learned sinks.
    """
    if packed is None:
        raise RuntimeError(
            "packed attention was called without document boundaries; run the model through "
            "model.hidden_states(model, batch), or load it with attention 'sdpa' for generation"
        )
    if attention_mask is not None or unused.get("position_bias") is not None or not _is_causal(module, is_causal):
        raise RuntimeError(
            f"{type(module).__name__} needs an attention mask, a position bias or non-causal attention; "
            "packed attention computes causal attention within documents only"
        )
    if dropout:
        raise RuntimeError(
            f"{type(module).__name__} requests attention dropout {dropout}; load_base turns the base's dropout off"
        )
    # some models keep q and k in fp32 after rotary embedding or qk-norm; the kernels need one type
    query, key = query.to(value.dtype), key.to(value.dtype)
    window = sliding_window if sliding_window is not None and sliding_window < packed.max_seqlen else None
    if packed.backend == "sdpa":
        out = _sdpa(query, key, value, packed, scaling, window, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
    out = _packed_kernel(query, key, value, packed, scaling, window, softcap, s_aux)
    return out[None], None


def register() -> None:
    """Registers PACKED and PROBE with transformers. Called once by `model`."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionInterface.register(PROBE, _probe_attention)


@dataclass(frozen=True)
class Call:
    """How one layer called its attention function."""

    has_documents: bool
    has_mask: bool  # or a position bias: what PACKED cannot compute
    is_causal: bool
    sliding_window: int | None


_calls: list[Call] = []


@contextmanager
def probing() -> Iterator[list[Call]]:
    """Inside, a model built with attention PROBE records its calls. For models on the meta device."""
    _calls.clear()
    yield _calls


def _probe_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed: object = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    has_mask = attention_mask is not None or keywords.get("position_bias") is not None
    _calls.append(Call(packed is not None, has_mask, _is_causal(module, is_causal), sliding_window))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _is_causal(module: torch.nn.Module, said: bool | None) -> bool:
    """As transformers' own functions decide: by the call, else by the layer (encoders say no there)."""
    return bool(getattr(module, "is_causal", True)) if said is None else said


# --- sdpa: a loop over documents --------------------------------------------------------------------------------------


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedDocuments,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(1, Hq, T, Dv). Slices by host-side lengths: no device synchronization, no (T, T) mask."""
    is_grouped = query.shape[1] != key.shape[1]
    plain = softcap is None and sinks is None
    outputs: list[Tensor] = []
    parts = zip(*(tensor.split(list(packed.lengths), dim=2) for tensor in (query, key, value)), strict=True)
    for length, (q, k, v) in zip(packed.lengths, parts, strict=True):
        has_window = window is not None and length > window
        mask = _causal_mask(packed, length, window, query.device) if has_window or not plain else None
        if plain:
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=is_grouped
                )
            )
        else:
            assert mask is not None
            outputs.append(_by_plain_math(q, k, v, mask, scaling, softcap, sinks))
    return torch.cat(outputs, dim=2)


def _causal_mask(packed: PackedDocuments, length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) bool, True where a query (row) may attend to a key. Kept for the other layers of this batch."""
    if (length, window) not in packed.windows:
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        allowed = distance >= 0
        if window is not None:
            allowed &= distance < window
        packed.windows[length, window] = allowed
    return packed.windows[length, window]


def _by_plain_math(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One document (1, Hq, L, Dv) with capped scores or sinks, which SDPA does not support. Softmax in fp32."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    # a sink is an extra key that absorbs probability and has no value
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    return weights.to(v.dtype) @ v


# --- flash and varlen: kernels that take boundaries -------------------------------------------------------------------


def _packed_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedDocuments,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(T, Hq, Dv) by one kernel call over all documents."""
    width = value.shape[-1]
    # squeeze, not [0]: the gradient of an index is written into zeros
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if width < q.shape[-1]:  # latent attention: the kernels need one width
        v = F.pad(v, (0, q.shape[-1] - width))
    boundaries, longest = packed.cu_seqlens, packed.max_seqlen
    left = -1 if window is None else window - 1  # the kernels do not count the token itself
    if sinks is not None:
        assert packed.backend == "varlen" and softcap is None  # `_why_not`
        out = flash_with_sinks(q, k, v, sinks, boundaries, longest, scaling, left)
    elif packed.backend == "flash":
        module = _flash_module(query.device, softcap is None and window is None)
        assert module is not None
        # flash-attn 4 uses None for an unbounded side of the window
        unbounded = None if module.__name__.startswith("flash_attn.cute") else -1
        out = module.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=boundaries,
            cu_seqlens_k=boundaries,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scaling,
            causal=True,
            window_size=(unbounded, unbounded) if window is None else (left, 0),
            **({} if softcap is None else {"softcap": softcap}),
        )
        out = out[0] if isinstance(out, tuple) else out
    else:
        out = _varlen(q, k, v, boundaries, longest, scaling, left)
    return out[..., :width]


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scaling: float | None, left: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_keywords()
    keywords: dict[str, Any] = {}
    # before torch 2.12 the kernel supports grouped heads, too: only the keyword is missing
    if q.shape[1] != k.shape[1] and "enable_gqa" in known:
        keywords["enable_gqa"] = True
    if "window_size" in known:
        keywords["window_size"] = (left, 0)
    else:
        assert left < 0  # `_why_not`
        keywords["is_causal"] = True
    if "scale" in known:
        keywords["scale"] = scaling
    elif scaling is not None:  # the kernel divides by sqrt(D): undo that first
        q = q * (scaling * q.shape[-1] ** 0.5)
    out = varlen_attn(q, k, v, starts, starts, longest, longest, **keywords)
    assert isinstance(out, Tensor)
    return out


@lru_cache(maxsize=1)
def _varlen_keywords() -> frozenset[str]:
    """Keywords of this torch's varlen_attn; empty if it has none. The set grew from 2.10 to 2.13."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@lru_cache(maxsize=8)
def _flash_module(device: torch.device, is_plain: bool) -> Any:
    """The module with `flash_attn_varlen_func`: flash-attn 4 on Hopper and later, else 2; None when absent."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    candidates: Sequence[str] = ("flash_attn",)
    # the backward pass of flash-attn 4 does not support capped scores, nor windows everywhere
    if torch.cuda.get_device_capability(device) >= (9, 0) and is_plain:
        candidates = ("flash_attn.cute", "flash_attn")
    for name in candidates:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            log.info("attention: %s cannot be imported: %s", name, error)
            continue
        if hasattr(module, "flash_attn_varlen_func"):
            return module
    return None
