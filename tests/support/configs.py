"""Tiny configs of every family of causal language models that this transformers has, found by enumeration.

A family's config is built from its class's own defaults with every known size made small, one layer of each kind. What
differs in a family (sizes that must agree with each other) is in `CHANGES`.
"""

from __future__ import annotations

import copy
from typing import Any

from helpers.tiny_models import FAMILIES as NAMED
from helpers.tiny_models import HYBRIDS, MIXTURES, SINKS, VOCABULARY, WRAPPED, WRAPPED_ALSO, WRAPPED_HYBRIDS
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

WRAPPERS = WRAPPED | WRAPPED_ALSO | WRAPPED_HYBRIDS

# by the key of a config, in whatever family has it: every linear layer's inputs are a multiple of the 4-bit block
_HIDDEN, _WIDTH, _HEADS, _LAYERS, _EXPERTS = 64, 128, 4, 2, 8
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "emb_dim"), _HIDDEN),
    **dict.fromkeys(
        (
            "intermediate_size",
            "n_inner",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "feed_forward_size",
        ),
        _WIDTH,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_encoder_layers",
            "num_decoder_layers",
        ),
        _LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
            "swa_num_attention_heads",
            "num_attention_groups",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
        ),
        _HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(
        (
            "head_dim",
            "kv_channels",
            "attention_head_dim",
            "swa_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "qk_nope_head_dim",
            "swa_v_head_dim",
            "attention_head_size",
            "rotary_dim",
        ),
        16,
    ),
    **dict.fromkeys(
        (
            "kv_lora_rank",
            "q_lora_rank",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "hidden_size_per_layer_input",
        ),
        64,
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(
        (
            "n_shared_experts",
            "num_shared_experts",
            "moe_num_shared_experts",
            "first_k_dense_replace",
            "topk_group",
            "num_dense_layers",
        ),
        1,
    ),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention"), 4),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CHANGES: dict[str, dict[str, Any]] = {
    **NAMED,
    **MIXTURES,
    **HYBRIDS,
    **SINKS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {"num_hidden_layers": 3},
    "dots3_note_text": {"num_key_value_heads": _HEADS},
    "minimax_m2": {"rotary_dim": 8},
    "emu3": {"vocabulary_map": {"<image>": 99}},
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "xmod": {"adapter_reduction_factor": 1},
}


def families() -> list[str]:
    """Every type of model that transformers loads as a causal language model, or with images or sound around one."""
    names: set[str] = set()
    for mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names |= set(getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"))
    return sorted(name for name in names if name in CONFIG_MAPPING)


def is_wrapper(family: str) -> bool:
    return family in WRAPPERS


def tiny_config(family: str) -> PretrainedConfig:
    """A small config of this family. Raises whatever the family's class raises for sizes that do not agree."""
    if family in WRAPPERS:
        text, rest = WRAPPERS[family]
        return AutoConfig.for_model(family, text_config=copy.deepcopy(text), **copy.deepcopy(rest))
    return AutoConfig.for_model(family, **small(CONFIG_MAPPING[family], CHANGES.get(family, {})))


def small(config_class: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a small config of a class: of its own keys those whose meaning is a size, with `changes`."""
    known = config_class().to_dict()
    values = {key: value for key, value in _SIZES.items() if key in known}
    if "qk_rope_head_dim" in known:
        values.pop("head_dim", None)  # it follows from the others, and every head has its own keys
        values |= {"num_key_value_heads": _HEADS} if "num_key_value_heads" in known else {}
    kinds = list(dict.fromkeys(known.get("layer_types") or ()))
    if len(kinds) > 1:
        values["layer_types"] = kinds
        values["num_hidden_layers"] = len(kinds)
    if known.get("sliding_window") is None:
        values.pop("sliding_window", None)  # it is switched on by other keys as well
    for part in config_class.sub_configs:
        inner = known.get(part)
        if isinstance(inner, dict) and (name := inner.get("model_type")) in CONFIG_MAPPING:
            values[part] = small(CONFIG_MAPPING[name], CHANGES.get(name, {}))
    return {**values, **changes}
