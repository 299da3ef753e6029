"""Tiny random models of many families, and folders of them with a tokenizer. Seeded, offline, milliseconds each.

Hidden sizes are multiples of 64, the 4-bit block size. Weights are larger than usual, so that attention is far from
uniform and a leak between documents is detected.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from qlora_dist.data.packing import Batch, Example, collate
from qlora_dist.model.attention import PACKED

disable_progress_bar()  # of the helpers' own save_pretrained, into what tests compare

torch.set_num_threads(1)  # tiny matrices: thread synchronization costs more than it saves

VOCABULARY = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED},
    "mistral": {**_GROUPED, "sliding_window": 4},
    "qwen2": {**_COMMON, "num_key_value_heads": 2},
    "qwen3": {**_GROUPED},
    "gemma": {**_GROUPED},
    "gemma2": {**_GROUPED, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        **_GROUPED,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {**_COMMON},
    "phi": {**_COMMON},
    "cohere": {**_GROUPED, "logit_scale": 0.25},
    "granite": {**_GROUPED, "logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "olmo2": {**_COMMON},
}

# with experts stacked into one parameter, of the form that is held in 4 bits
_MIXTURE: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_MIXTURE, "num_experts": 8, "num_experts_per_tok": 3},
    "mixtral": {**_MIXTURE, "num_local_experts": 4},
    "qwen2_moe": {**_MIXTURE, "num_experts": 8, "shared_expert_intermediate_size": 64},
    "olmoe": {**_MIXTURE, "num_experts": 8},
    "flex_olmo": {**_MIXTURE, "num_experts": 4},
    "glm4_moe": {**_MIXTURE, "n_routed_experts": 8, "first_k_dense_replace": 1},
    "dots1": {**_MIXTURE, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "ernie4_5_moe": {**_MIXTURE, "moe_num_experts": 8, "moe_k": 2},
    "solar_open": {**_MIXTURE, "n_routed_experts": 8},
}
# with experts whose matrices are (inputs, outputs), biases, and attention sinks
SINKS: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        **_GROUPED,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "swiglu_limit": 2.0,  # reached by these weights
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    }
}

# with layers that carry state along the row: linear attention, short convolutions, Mamba 2
_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_DELTA_MIXTURE = {**_MIXTURE, **_DELTA, "num_experts": 4, "shared_expert_intermediate_size": 64}
_MAMBA: dict[str, Any] = {
    **_GROUPED,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**_GROUPED, **_DELTA},
    "qwen3_next": _DELTA_MIXTURE,
    "qwen3_5_moe_text": _DELTA_MIXTURE,
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "nemotron_h": {
        **_GROUPED,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "n_groups": 2,
    },
}

_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
_PATCHES: dict[str, Any] = {**_VISION, "image_size": 16, "patch_size": 8}
_QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
# models that read images or sound around a language model: (the text model's config, the rest)
WRAPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {**FAMILIES["gemma3_text"], "query_pre_attn_scalar": 8},
        {"vision_config": _PATCHES, "mm_tokens_per_image": 4, "image_token_index": 99},
    ),
    "mistral3": (
        {**_GROUPED, "model_type": "mistral"},
        {
            "vision_config": {**_PATCHES, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": 99,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_vl": (
        {**_COMMON, "num_key_value_heads": 2, "rope_parameters": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        {"vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}},
    ),
    "qwen2_5_vl": (
        {**_COMMON, "num_key_value_heads": 2, "rope_parameters": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        {"vision_config": {**_QWEN_VISION, **_VISION, "out_hidden_size": 64, "fullatt_block_indexes": [1]}},
    ),
    "qwen3_vl": (
        {
            **_GROUPED,
            "rope_parameters": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
        },
        {
            "vision_config": {
                **_QWEN_VISION,
                **_VISION,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
}
# accepted by the same tests of the model, but those that take ranks or runs
WRAPPED_ALSO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": (
        {**_GROUPED, "model_type": "llama"},
        {"vision_config": {**_PATCHES, "model_type": "clip_vision_model"}, "image_token_index": 99},
    ),
    "llava_next": (
        {**_GROUPED, "model_type": "mistral", "sliding_window": 4},
        {"vision_config": {**_PATCHES, "model_type": "clip_vision_model"}, "image_token_index": 99},
    ),
    "llava_onevision": (
        {**FAMILIES["qwen2"], "model_type": "qwen2"},
        {"vision_config": {**_PATCHES, "model_type": "siglip_vision_model"}, "image_token_index": 99},
    ),
    "internvl": (
        {**_GROUPED, "model_type": "qwen3"},
        {"vision_config": {**_VISION, "image_size": [16, 16], "patch_size": [8, 8]}, "image_token_id": 99},
    ),
    "idefics3": (
        {**_GROUPED, "model_type": "llama"},
        {"vision_config": _PATCHES, "image_token_id": 99, "pad_token_id": 0},
    ),
    "smolvlm": (
        {**_GROUPED, "model_type": "llama"},
        {"vision_config": _PATCHES, "image_token_id": 99, "pad_token_id": 0},
    ),
}
_QWEN3_5: dict[str, Any] = {
    "vision_config": {**_QWEN_VISION, **_VISION, "out_hidden_size": 64, "num_position_embeddings": 16},
}
# ... whose text model has layers with state
WRAPPED_HYBRIDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_5": (HYBRIDS["qwen3_5_text"], _QWEN3_5),
    "qwen3_5_moe": (HYBRIDS["qwen3_5_moe_text"], _QWEN3_5),
}
# in the names of their weights outside of the text model
OTHER_TOWERS = ("vision", "visual", "multi_modal_projector", "connector", "image_newline")


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    kinds = FAMILIES | MIXTURES | SINKS | HYBRIDS
    return AutoConfig.for_model(family, **{**kinds.get(family, _COMMON), **changes})


def tiny_model(family: str = "llama", attention: str | None = PACKED, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model in eval mode. With attention PACKED it runs packed batches with the sdpa backend."""
    torch.manual_seed(seed)
    return randomized(
        AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation=attention), seed
    )


def tiny_wrapper(family: str, seed: int = 0, tied: bool | None = None, **changes: Any) -> PreTrainedModel:
    """A random fp32 model around a text model, in eval mode. `changes` are of the text model; `tied` of the whole."""
    text, rest = (WRAPPED | WRAPPED_ALSO | WRAPPED_HYBRIDS)[family]
    config = AutoConfig.for_model(family, text_config={**text, **changes}, **rest)
    if tied is not None:
        config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    return randomized(AutoModelForMultimodalLM.from_config(config), seed)


def randomized(model: Any, seed: int) -> PreTrainedModel:
    """The same model with random weights, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                scale = 2.0 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith(("bias", "sinks")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.tie_weights()
    model.packed_backend = "sdpa"
    return model.eval()


def random_batch(lengths: tuple[int, ...], seed: int = 0, vocabulary: int = VOCABULARY) -> Batch:
    """Packed documents of these lengths; every token except the first of each document is a label."""
    generator = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        is_label = np.ones(length, dtype=bool)
        is_label[0] = False
        examples.append(Example(generator.integers(3, vocabulary, length).astype(np.int32), is_label))
    return collate(examples, (0,))


def alone(batch: Batch) -> list[Batch]:
    """Each document of a batch as a separate batch."""
    parts = batch.input_ids[0].split(list(batch.lengths))
    return [
        collate([Example(part.numpy().astype(np.int32), np.arange(len(part)) > 0)], (index,))
        for index, part in enumerate(parts)
    ]


def save_model(folder: Path, model: PreTrainedModel | None = None, *, tokenizer: bool = True) -> Path:
    """A folder that load_base reads: config, safetensors, and a word-level tokenizer with a chat template."""
    (model if model is not None else tiny_model(attention=None)).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """Words w3 to w127, <pad> <s> </s>; unknown words become w3. Renders a chat as `w4 user-text w5 answer </s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w4 ' if m.role == 'user' else 'w5 ' }}{{ m.content }}"
        "{{ ' ' if m.role == 'user' else ' </s> ' }}{% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
    )
    return tokenizer


def shared_model(name: str) -> Path:
    """A small pretrained model from the shared data folder; skips the test if it is missing."""
    root = Path(os.environ.get("QLORA_DIST_SHARED", Path(__file__).parents[2].parent / "shared"))
    folder = root / "data" / "models" / name
    if not folder.is_dir():
        pytest.skip(f"pretrained model {name} is not in {folder.parent} (set QLORA_DIST_SHARED)")
    return folder
