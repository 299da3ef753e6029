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
}


def text_json(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a wrapper's config.json that describes its text model; any other config unchanged."""
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    if wrapper is None:
        return config
    part = config.get("text_config")
    text: dict[str, Any] = part if isinstance(part, dict) else config  # older files have all keys on one level
    named = wrapper.text_type if text is config else text.get("model_type", wrapper.text_type)
    return {
        **text,
        "model_type": wrapper.stand_in or named,
        "tie_word_embeddings": config.get("tie_word_embeddings", wrapper.is_tied),
    }
