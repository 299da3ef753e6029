"""What `lora.experts` is refused with, and what it selects."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_dist.config import parse_config
from qlora_dist.config.names import adapted_names
from qlora_dist.errors import UserError


@pytest.mark.parametrize(
    ("lora", "quantization", "message"),
    [
        ({"dropout": 0.1}, "nf4", r"experts is all, but dropout is 0\.1: PEFT's adapters of stacked experts have none"),
        ({"variant": "dora"}, "nf4", "experts is all, but variant is dora, which PEFT has for linear layers only"),
        ({}, "none", r"lora\.experts is all, but model\.quantization is none"),
        ({}, "int8", r"lora\.experts is all, but model\.quantization is int8"),
    ],
)
def test_what_cannot_be_trained_on_experts_is_refused(lora: dict[str, Any], quantization: str, message: str) -> None:
    raw = {
        "run_dir": "unused", "train": {"steps": 1}, "data": {"train": [{"path": "unused"}]},
        "model": {"name": "unused", "quantization": quantization},
    }  # fmt: skip
    parse_config(raw | {"lora": lora})
    with pytest.raises(UserError, match=message):
        parse_config(raw | {"lora": lora | {"experts": "all"}})


def test_none_leaves_out_shared_experts_alone() -> None:
    names = ["0.self_attn.q_proj", "0.mlp.shared_expert.up_proj", "1.mlp.shared_experts.up_proj", "1.mlp.up_proj"]
    assert adapted_names(names, "all-linear", "none") == ["0.self_attn.q_proj", "1.mlp.up_proj"]
    assert adapted_names(names, "all-linear", "all") == adapted_names(names, "all-linear", "shared") == names
    with pytest.raises(UserError, match=r"lora\.experts is none, but lora\.target_modules selects nothing but shared"):
        adapted_names(names, ["shared_expert.up_proj"], "none")
