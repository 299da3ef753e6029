"""config.json -> the shapes of a model, by plain arithmetic: no torch, no weights, a few milliseconds.

A family is described by its differences: the linear layers of a decoder layer in forward order, which of them have
biases, the number and placement of norms. A family that is not listed here is built on the meta device and measured
instead (`memory.read_shapes`), which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..config.wrappers import text_json
from ..errors import UserError, shortened
from .shapes import Experts, Linear, ModelShapes


def _llama_like(
    config: dict[str, Any],
    *,
    qkv_bias: bool | None = None,
    out_bias: bool | None = None,
    norms: int = 2,
    tied: bool = False,
    **differences: Any,
) -> ModelShapes:
    """Llama, and families with other biases and norms. A bias of None is the config's `attention_bias`."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    attention_bias = bool(config.get("attention_bias", False))
    qkv_bias = attention_bias if qkv_bias is None else qkv_bias
    out_bias = attention_bias if out_bias is None else out_bias
    mlp_bias = bool(config.get("mlp_bias", False))
    queries, keys = heads * head_dim, kv_heads * head_dim
    linears = (
        Linear("self_attn.q_proj", hidden, queries, qkv_bias),
        Linear("self_attn.k_proj", hidden, keys, qkv_bias),
        Linear("self_attn.v_proj", hidden, keys, qkv_bias),
        Linear("self_attn.o_proj", queries, hidden, out_bias),
        Linear("mlp.gate_proj", hidden, width, mlp_bias),
        Linear("mlp.up_proj", hidden, width, mlp_bias),
        Linear("mlp.down_proj", width, hidden, mlp_bias),
    )
    qk = differences.get("qk_norm", "none")
    qk_weights = {"none": 0, "head": 2 * head_dim, "row": queries + keys}[qk]
    vocabulary = config["vocab_size"]
    is_tied = bool(config.get("tie_word_embeddings", tied))
    return ModelShapes(
        family=config["model_type"],
        num_layers=config["num_hidden_layers"],
        hidden=hidden,
        vocabulary=vocabulary,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layer_prefix="model.layers",
        linears=linears,
        norm_weights=norms * hidden + qk_weights,
        embedding_weights=vocabulary * hidden,
        head_weights=0 if is_tied else vocabulary * hidden,
        final_weights=hidden,
        is_silu=config.get("hidden_act", "silu") == "silu",
        rotary_dim=head_dim,
        has_softcap=config.get("attn_logit_softcapping") is not None,
        caps_logits=config.get("final_logit_softcapping") is not None,
        **differences,
    )


def _llama(config: dict[str, Any]) -> ModelShapes:
    return _llama_like(config)


def _mistral(config: dict[str, Any]) -> ModelShapes:
    return _llama_like(config, qkv_bias=False, out_bias=False)


def _qwen2(config: dict[str, Any]) -> ModelShapes:
    return _llama_like(config, qkv_bias=True, out_bias=False)


def _qwen3(config: dict[str, Any]) -> ModelShapes:
    return _llama_like(config, qk_norm="head")


def _mixture(dense: ModelShapes, num_experts: int, top_k: int, inner: int) -> ModelShapes:
    """The same attention with a router and stacked experts in every layer."""
    return replace(
        dense,
        linears=dense.linears[:4],
        norm_weights=dense.norm_weights + num_experts * dense.hidden,
        experts=Experts("mlp.experts", num_experts, top_k, dense.hidden, inner),
    )


def _qwen3_moe(config: dict[str, Any]) -> ModelShapes:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise _Unlisted
    # transformers 5 writes the second name
    num_experts = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    return _mixture(_qwen3(config), num_experts, config["num_experts_per_tok"], config["moe_intermediate_size"])


def _mixtral(config: dict[str, Any]) -> ModelShapes:
    width = config["intermediate_size"]
    return _mixture(_mistral(config), config["num_local_experts"], config["num_experts_per_tok"], width)


def _gemma(config: dict[str, Any]) -> ModelShapes:
    return _llama_like({"head_dim": 256, **config}, tied=True)


def _gemma2(config: dict[str, Any]) -> ModelShapes:
    # the class's own defaults, for config files that leave them out
    defaults = {"head_dim": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _llama_like({**defaults, **config}, tied=True, norms=4, norm_place="sandwich")


def _gemma3(config: dict[str, Any]) -> ModelShapes:
    return _llama_like({"head_dim": 256, **config}, tied=True, norms=4, norm_place="sandwich", qk_norm="head")


def _granite(config: dict[str, Any]) -> ModelShapes:
    return _llama_like(config, scales_logits=True)


def _olmo2(config: dict[str, Any]) -> ModelShapes:
    return _llama_like(config, norm_place="post", qk_norm="row")


def _cohere(config: dict[str, Any]) -> ModelShapes:
    if config.get("use_qk_norm"):
        raise _Unlisted
    return _llama_like(
        config, tied=True, norms=1, norm="fp32_layer", is_parallel=True, shares_norm=True, scales_logits=True
    )


def _two_matrix(
    config: dict[str, Any],
    *,
    prefix: str,
    linears: tuple[Linear, ...],
    rotary_share: float | None,
    tied: bool,
    positions: int = 0,
    head_bias: bool = False,
    **differences: Any,
) -> ModelShapes:
    """Layer norms with biases and an MLP of two matrices: GPT-2, GPT-NeoX, Phi."""
    hidden = config.get("hidden_size") or config["n_embd"]
    heads = config.get("num_attention_heads") or config["n_head"]
    vocabulary = config["vocab_size"]
    head_dim = hidden // heads
    num_norms = 1 if differences.get("shares_norm") else 2
    is_tied = bool(config.get("tie_word_embeddings", tied))
    return ModelShapes(
        family=config["model_type"],
        num_layers=config.get("num_hidden_layers") or config["n_layer"],
        hidden=hidden,
        vocabulary=vocabulary,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        layer_prefix=prefix,
        linears=linears,
        norm_weights=num_norms * 2 * hidden,
        embedding_weights=(vocabulary + positions) * hidden,
        head_weights=0 if is_tied else vocabulary * hidden,
        final_weights=2 * hidden + (vocabulary if head_bias else 0),
        norm="layer",
        is_gated=False,
        rotary_dim=0 if rotary_share is None else int(rotary_share * head_dim),
        splits_rotary=rotary_share is not None,
        **differences,
    )


def _gpt2(config: dict[str, Any]) -> ModelShapes:
    hidden = config["n_embd"]
    width = config.get("n_inner") or 4 * hidden
    return _two_matrix(
        config,
        prefix="transformer.h",
        linears=(
            Linear("attn.c_attn", hidden, 3 * hidden, True),
            Linear("attn.c_proj", hidden, hidden, True),
            Linear("mlp.c_fc", hidden, width, True),
            Linear("mlp.c_proj", width, hidden, True),
        ),
        rotary_share=None,
        tied=True,
        positions=config.get("n_positions", 1024),
        activation="composed" if config.get("activation_function", "gelu_new") == "gelu_new" else "one",
    )


def _rotary_share(config: dict[str, Any], key: str, default: float) -> float:
    nested = (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    return float(config.get(key) or nested or default)


def _gpt_neox(config: dict[str, Any]) -> ModelShapes:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    has_bias = bool(config.get("attention_bias", True))
    return _two_matrix(
        config,
        prefix="gpt_neox.layers",
        linears=(
            Linear("attention.query_key_value", hidden, 3 * hidden, has_bias),
            Linear("attention.dense", hidden, hidden, has_bias),
            Linear("mlp.dense_h_to_4h", hidden, width, True),
            Linear("mlp.dense_4h_to_h", width, hidden, True),
        ),
        rotary_share=_rotary_share(config, "rotary_pct", 0.25),
        tied=False,
        is_parallel=bool(config.get("use_parallel_residual", True)),
    )


def _phi(config: dict[str, Any]) -> ModelShapes:
    if config.get("qk_layernorm"):
        raise _Unlisted
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width, head_dim = config["intermediate_size"], hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head_dim
    return _two_matrix(
        config,
        prefix="model.layers",
        linears=(
            Linear("self_attn.q_proj", hidden, hidden, True),
            Linear("self_attn.k_proj", hidden, keys, True),
            Linear("self_attn.v_proj", hidden, keys, True),
            Linear("self_attn.dense", hidden, hidden, True),
            Linear("mlp.fc1", hidden, width, True),
            Linear("mlp.fc2", width, hidden, True),
        ),
        rotary_share=_rotary_share(config, "partial_rotary_factor", 0.5),
        tied=False,
        head_bias=True,
        is_parallel=True,
        shares_norm=True,
        activation="composed" if config.get("hidden_act", "gelu_new") == "gelu_new" else "one",
    )


def _phi3(config: dict[str, Any]) -> ModelShapes:
    plain = _llama_like(config)
    q, k, v, o, gate, up, down = plain.linears
    return replace(
        plain,
        linears=(
            Linear("self_attn.qkv_proj", plain.hidden, q.outputs + k.outputs + v.outputs),
            o,
            Linear("mlp.gate_up_proj", plain.hidden, gate.outputs + up.outputs),
            down,
        ),
        rotary_dim=int(plain.head_dim * _rotary_share(config, "partial_rotary_factor", 1.0)),
        splits_rotary=True,
    )


FAMILIES: dict[str, Callable[[dict[str, Any]], ModelShapes]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "granite": _granite,
    "olmo2": _olmo2,
    "cohere": _cohere,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "phi": _phi,
    "phi3": _phi3,
}


class _Unlisted(Exception):
    """A variant of a listed family that is not described here."""


def shapes_from_config(config: dict[str, Any]) -> ModelShapes | None:
    """Shapes from config.json as plain data, of a wrapper those of its text model. None: the family is not listed and
    must be measured.

    Raises UserError if the file lacks a size that every model has.
    """
    text = text_json(config)
    family = text.get("model_type")
    if family not in FAMILIES:
        return None
    try:
        positions = text.get("max_position_embeddings") or text.get("n_positions")
        shapes = replace(FAMILIES[family](text), max_positions=positions)
        _check_sizes(shapes)
    except _Unlisted:
        return None
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        if text is not config and isinstance(error, KeyError):
            return None  # the class of a text model has defaults for what a wrapper's file leaves out
        raise UserError(
            f"config.json of a {family} model: {shortened(error)} is missing or not a number; expected the config.json "
            "that transformers writes next to the weights"
        ) from None
    return shapes


def _check_sizes(shapes: ModelShapes) -> None:
    """Raises ValueError for a size that is none: not every key that a family reads is checked when it is read."""
    sizes = [size for linear in shapes.linears for size in (linear.inputs, linear.outputs)]
    if (experts := shapes.experts) is not None:
        sizes += [experts.num_experts, experts.top_k, experts.inner]
        if experts.top_k > experts.num_experts:
            raise ValueError(f"{experts.top_k} experts per token of {experts.num_experts}")
    sizes += [] if shapes.max_positions is None else [shapes.max_positions]
    for size in (*sizes, shapes.embedding_weights, shapes.norm_weights):
        if type(size) is not int or not 1 <= size < 2**63:
            raise ValueError(f"a size of {shortened(size)}")
    if not 0 <= shapes.rotary_dim <= shapes.head_dim:
        raise ValueError(f"a rotary part of {shapes.rotary_dim} of {shapes.head_dim}")
