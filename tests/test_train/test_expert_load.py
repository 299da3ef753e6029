"""Tokens per expert: what is counted, and who is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import random_batch, save_model, tiny_model

from qlora_dist.model import evaluation_mode, hidden_states, load_base, set_recompute, take_slots
from qlora_dist.model.lora import attach_lora
from qlora_dist.train.expert_load import IdleExperts, load_values


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_each_token_of_training_is_counted_once(recompute: str, tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model("qwen3_moe", attention=None), tokenizer=False)
    settings = {"quantization": "nf4", "double_quant": True, "compute_dtype": torch.float32, "attention": "sdpa"}
    base = load_base(str(tmp_path), device=torch.device("cpu"), **settings)
    model = attach_lora(base, rank=2, alpha=2, experts="all").train()
    set_recompute(model, recompute)
    for lengths in ((9, 6), (4,)):
        hidden_states(model, random_batch(lengths)).sum().backward()
    with evaluation_mode(model):
        hidden_states(model, random_batch((7,)))
    slots = take_slots(model)
    assert list(slots) == [f"model.layers.{index}.mlp.experts" for index in range(2)]
    assert [(len(own), sum(own)) for own in slots.values()] == [(8, 3 * 19)] * 2
    assert not any(sum(own) for own in take_slots(model).values())


def test_load_is_that_of_the_least_even_layer() -> None:
    assert load_values({"a": [2, 2, 2, 2], "b": [0, 6, 2, 0]}) == {"expert_load": 3.0, "experts_without_tokens": 2}
    assert load_values({"a": [1, 1]}) == {"expert_load": 1.0, "experts_without_tokens": 0}
    assert load_values({}) == load_values({"a": [0, 0]}) == {}


def test_an_expert_without_tokens_is_named_once() -> None:
    idle = IdleExperts(patience=3)
    said = [idle.add({"a": [1, 0, step % 2]}) for step in range(9)]
    (only,) = [text for text in said if text is not None]
    assert said.index(only) == 2 and "no token was routed to expert 1 of a in 3 steps" in only
    assert idle.add({"a": [0, 1, 1]}) is None
    many = IdleExperts(patience=1).add({"a": [0] * 6, "b": [1]})
    assert many is not None and "expert 0 of a, 1 of a, 2 of a, 3 of a and 2 more in 1 steps" in many
