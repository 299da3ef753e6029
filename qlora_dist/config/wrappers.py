"""Models that wrap a language model with towers for images or sound: which are trained as their text model, and where
config.json describes it. Does not import torch.

A family is listed when the tests have shown that its text model alone computes what the wrapper computes on text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wrapper:
    """What transformers' classes know of a wrapper and config.json may leave out."""

    text_type: str  # model_type of the text model, where config.json does not name it
    is_tied: bool  # tie_word_embeddings
    stand_in: str | None = None  # a causal language model of the same layers, where the text model has none of its own


WRAPPERS = {
    "gemma3": Wrapper("gemma3_text", is_tied=True),
    "mistral3": Wrapper("mistral", is_tied=True),
    "qwen2_vl": Wrapper("qwen2_vl_text", is_tied=False, stand_in="qwen2"),
    "qwen2_5_vl": Wrapper("qwen2_5_vl_text", is_tied=False, stand_in="qwen2"),
    "qwen3_vl": Wrapper("qwen3_vl_text", is_tied=False, stand_in="qwen3"),
    "qwen3_5": Wrapper("qwen3_5_text", is_tied=False),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text", is_tied=False),
    "llava": Wrapper("llama", is_tied=False),
    "llava_next": Wrapper("llama", is_tied=False),
    "llava_onevision": Wrapper("qwen2", is_tied=False),
    "internvl": Wrapper("qwen2", is_tied=True),
    "idefics3": Wrapper("llama", is_tied=False),
    "smolvlm": Wrapper("llama", is_tied=False),
}

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim")  # fmt: skip
# sizes of the text model's class, which config.json leaves out where they hold; None: not a key of the class
_DEFAULTS: dict[str, tuple[int | None, ...]] = {
    "gemma3_text": (262_208, 2304, 9216, 26, 8, 4, 256),
    "mistral": (32_000, 4096, 14_336, 32, 32, 8, None),
    "qwen2_vl_text": (152_064, 8192, 29_568, 80, 64, 8, None),
    "qwen2_5_vl_text": (152_064, 8192, 29_568, 80, 64, 8, None),
    "qwen3_vl_text": (151_936, 4096, 22_016, 32, 32, 32, 128),
    "llama": (32_000, 4096, 11_008, 32, 32, None, None),
    "qwen2": (151_936, 4096, 22_016, 32, 32, 32, None),
    "qwen3": (151_936, 4096, 22_016, 32, 32, 32, 128),
    "qwen3_5_text": (248_320, 4096, 12_288, 32, 16, 4, 256),
    "qwen3_5_moe_text": (248_320, 2048, None, 40, 16, 2, 256),
}


def text_json(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a wrapper's config.json that describes its text model; any other config unchanged."""
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    if wrapper is None:
        return config
    part = config.get("text_config")
    text: dict[str, Any] = part if isinstance(part, dict) else config  # older files have all keys on one level
    named = wrapper.text_type if text is config else text.get("model_type", wrapper.text_type)
    defaults = dict(zip(_SIZES, _DEFAULTS.get(str(named), ()), strict=False))
    return {
        **{key: value for key, value in defaults.items() if value is not None},
        **text,
        "model_type": named if wrapper.stand_in is None else wrapper.stand_in,
        "tie_word_embeddings": config.get("tie_word_embeddings", wrapper.is_tied),
    }
