"""What config.json may leave out of a wrapper is what transformers' classes have there."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from qlora_dist.config.wrappers import _DEFAULTS, _SIZES, WRAPPERS, text_json

SET = {"vocab_size": 160, "hidden_size": 96, "num_hidden_layers": 3, "num_key_value_heads": 2}


@pytest.mark.parametrize("text_type", _DEFAULTS)
def test_sizes_that_are_left_out_are_those_of_the_class(text_type: str) -> None:
    """All sizes that the class has: one that is not listed would be missing from the plan."""
    known = AutoConfig.for_model(text_type).to_dict()
    listed = dict(zip(_SIZES, _DEFAULTS[text_type], strict=True))
    assert {key: value for key, value in listed.items() if value is not None} == {
        key: known[key] for key in _SIZES if known.get(key) is not None and listed[key] is not None
    }
    # the class computes these from others, where they are not named, or has no such size
    computed = {"head_dim", "num_key_value_heads"} | (set(_SIZES) - known.keys())
    assert {key for key, value in listed.items() if value is None} <= computed


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_wrapper_alone_is_what_its_class_is(family: str) -> None:
    whole: Any = AutoConfig.for_model(family)
    found = text_json({"model_type": family})
    text = whole.get_text_config()
    assert WRAPPERS[family].text_type == text.model_type
    assert found["tie_word_embeddings"] == bool(getattr(whole, "tie_word_embeddings", False))
    assert found["model_type"] == (WRAPPERS[family].stand_in or text.model_type)
    assert set(found) - {"model_type", "tie_word_embeddings"} == {
        key for key, value in zip(_SIZES, _DEFAULTS[text.model_type], strict=True) if value is not None
    }


@pytest.mark.parametrize("family", WRAPPERS)
@pytest.mark.parametrize("tied", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_keys_on_one_level_mean_what_they_mean_in_the_text_config(family: str, tied: dict[str, bool]) -> None:
    """As older files have them."""
    nested = text_json({"model_type": family, "text_config": SET, **tied})
    assert text_json({"model_type": family, **SET, **tied}) == nested
    assert nested.items() >= SET.items() and nested["model_type"] not in WRAPPERS


@pytest.mark.parametrize("config", [{}, {"model_type": "llama", **SET}, {"model_type": None, "text_config": SET}])
def test_any_other_config_is_unchanged(config: dict[str, Any]) -> None:
    assert text_json(config) is config
