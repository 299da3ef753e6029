"""A document has the values that it has alone: rotary frequencies by its own length, and nothing random in the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import alone, random_batch, save_model, tiny_model
from torch import nn

from qlora_dist.errors import UserError
from qlora_dist.model import check_head, hidden_states, load_base
from qlora_dist.model.pretrained import switch_dropout_off
from qlora_dist.model.rope import scale_by_document

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
}
BY_LENGTH: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": LONGROPE, "num_key_value_heads": 2},
    "llama": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("family", BY_LENGTH)
@torch.no_grad()
def test_a_packed_document_has_the_frequencies_of_its_own_length(family: str, tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(family, attention=None, **BY_LENGTH[family]), tokenizer=False)
    model = load_base(
        str(tmp_path),
        quantization="none",
        double_quant=True,
        compute_dtype=torch.float32,
        attention="auto",
        device=torch.device("cpu"),
    )
    check_head(model)
    batch = random_batch((12, 40, 5, 60, 45, 12))  # each length after a longer and after a shorter one
    packed = hidden_states(model, batch)
    separate = torch.cat([hidden_states(model, one) for one in alone(batch)])
    torch.testing.assert_close(packed, separate, atol=2e-5, rtol=1e-5)  # fp32; few rows may be summed in another order
    assert torch.equal(packed, hidden_states(model, batch)), "a row changes the next one"
    own = tiny_model(family, attention="eager", **BY_LENGTH[family])
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    first = own.base_model(input_ids=batch.input_ids[:, : ends[0]]).last_hidden_state[0]
    longest = own.base_model(input_ids=batch.input_ids[:, ends[2] : ends[3]]).last_hidden_state[0]
    torch.testing.assert_close(packed[: ends[0]], first, atol=2e-5, rtol=1e-5)  # fp32 sums in another order
    torch.testing.assert_close(packed[ends[2] : ends[3]], longest, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", BY_LENGTH)
def test_frequencies_chosen_by_the_row_are_found_by_the_check_of_the_loaded_model(family: str) -> None:
    model = tiny_model(family, **BY_LENGTH[family])
    before = str(model.config)
    with pytest.raises(UserError, match=r"lets a packed document see|computes its logits in an unsupported way"):
        check_head(model)
    assert str(model.config) == before
    scale_by_document(model, model.base_model)
    check_head(model)


RANDOM: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "starcoder2": {"num_key_value_heads": 2, "residual_dropout": 0.1, "embedding_dropout": 0.1},
    "seed_oss": {"num_key_value_heads": 2, "head_dim": 16, "residual_dropout": 0.1},
    "persimmon": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "layerdrop": 0.5},
    "biogpt": {"layerdrop": 0.5},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.3},
}


@pytest.mark.parametrize("family", RANDOM)
@torch.no_grad()
def test_dropout_jitter_and_skipped_layers_are_switched_off_under_every_name(family: str) -> None:
    model = tiny_model(family, **RANDOM[family])
    before, batch = str(model.config), random_batch((6, 4))
    switch_dropout_off(model)
    evaluated = hidden_states(model, batch)
    model.train()
    assert torch.equal(hidden_states(model, batch), hidden_states(model, batch))
    assert torch.equal(hidden_states(model, batch), evaluated)
    assert str(model.config) == before, "the config is exported with the model"
    check_head(model)


class _Hidden(nn.Module):
    """Dropout under a name that nobody can guess."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.1, self.training)


def test_a_base_that_stays_random_is_rejected_and_its_numbers_are_not_drawn_from_the_run() -> None:
    model = tiny_model()
    state = torch.get_rng_state()
    check_head(model)
    model.model.norm = nn.Sequential(model.model.norm, _Hidden())
    with pytest.raises(UserError, match="LlamaForCausalLM is random in training"):
        check_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


@torch.no_grad()
def test_a_jitter_that_also_decides_in_evaluation_is_rejected() -> None:
    model = tiny_model()

    class Threshold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.jitter = 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1 + self.jitter)

    model.model.norm = nn.Sequential(model.model.norm, Threshold())
    model.switched_off = switch_dropout_off(model)
    with pytest.raises(UserError, match="cannot be switched off without another result"):
        check_head(model)
