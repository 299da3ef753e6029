"""No weight that was meant to be quantized is left wide: each is looked at, not only their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import save_model, tiny_model
from helpers.tiny_run import config_of, make_inputs

from qlora_dist.errors import RunFailed
from qlora_dist.model import linear_layers, load_base, stacked_experts
from qlora_dist.model.lora import attach_lora
from qlora_dist.train import setup_model, train
from qlora_dist.train.checks.base import check_storage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A mixture with a shared expert."""
    return save_model(tmp_path_factory.mktemp("mixture"), tiny_model("qwen2_moe", attention=None), tokenizer=False)


def base_of(folder: Path, quantization: Any = "nf4") -> Any:
    settings = {"double_quant": True, "compute_dtype": torch.bfloat16, "attention": "sdpa"}
    return load_base(str(folder), quantization=quantization, device=torch.device("cpu"), **settings)


def put(model: Any, name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def test_a_single_wide_weight_is_named(folder: Path) -> None:
    settings: dict[str, Any] = {"name": str(folder), "quantization": "nf4", "dtype": torch.bfloat16}
    plain, model = base_of(folder, "none"), attach_lora(base_of(folder), rank=2, alpha=2, target_modules=("q_proj",))
    check_storage(model, **settings)
    check_storage(plain, **settings | {"quantization": "none"})
    base = model.get_base_model()
    experts = next(iter(stacked_experts(plain)))
    layer = "model.layers.1.mlp.shared_expert.up_proj"
    for name, text in (
        (layer, rf"linear layer {layer}\.weight: stored in torch\.bfloat16, but model\.quantization nf4"),
        (experts, rf"experts {experts}\.gate_up_proj and 1 more weights: stored in torch\.bfloat16"),
    ):
        quantized = base.get_submodule(name)
        put(base, name, plain.get_submodule(name))
        with pytest.raises(RunFailed, match=text):
            check_storage(model, **settings)
        put(base, name, quantized)
    adapted = base.get_submodule("model.layers.0.self_attn.q_proj")
    quantized, adapted.base_layer = adapted.base_layer, linear_layers(plain)["model.layers.0.self_attn.q_proj"]
    with pytest.raises(RunFailed, match=r"linear layer model\.layers\.0\.self_attn\.q_proj\.weight: stored"):
        check_storage(model, **settings)
    adapted.base_layer = quantized
    base.get_input_embeddings().float()
    with pytest.raises(RunFailed, match=r"table the input table: stored in torch\.float32"):
        check_storage(model, **settings)


def test_it_ends_a_run_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sum of all bytes would not tell: here it is made to agree."""
    raw = make_inputs(tmp_path)
    plain = load_base(
        raw["model"]["name"], quantization="none", double_quant=False, compute_dtype=torch.float32, attention="sdpa",
        device=torch.device("cpu"),
    )  # fmt: skip
    name = "model.layers.1.mlp.down_proj"

    def with_one_wide_layer(*args: Any, **settings: Any) -> Any:
        model = load_base(*args, **settings)
        put(model, name, linear_layers(plain)[name])
        return model

    monkeypatch.setattr(setup_model, "load_base", with_one_wide_layer)
    monkeypatch.setattr(setup_model, "check_base_bytes", lambda *_: None)
    with pytest.raises(RunFailed, match=rf"linear layer {name}\.weight: stored in torch\.float32"):
        train(config_of(raw))
