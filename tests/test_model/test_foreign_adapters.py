"""Adapters that anyone may have made: what is honoured, what is refused and by which words, what is damaged."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import save_model, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_dist.commands import invoke
from qlora_dist.errors import UserError
from qlora_dist.model import INFERENCE, load_base, lora
from qlora_dist.model.base_weights import non_finite_tensor
from qlora_dist.model.bitsandbytes_import import bitsandbytes
from qlora_dist.model.lora import attach_lora, load_adapters
from qlora_dist.model.lora_files import CONFIG, WEIGHTS, read_adapter, save_adapter
from qlora_dist.model.weights.quantize import Range, quantize_range

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    model = attach_lora(tiny_model(), rank=2, alpha=4)
    with torch.no_grad():
        for name, parameter in lora.trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.fill_(0.01)
    save_adapter(model, folder, str(base))
    return folder


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def change(adapter: Path, **settings: Any) -> None:
    raw = json.loads((adapter / CONFIG).read_text()) | settings
    (adapter / CONFIG).write_text(json.dumps(raw))


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_took_a_part_of_its_base_is_refused_with_the_remedy(begun: Any, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_model(attention=None), LoraConfig(r=2, init_lora_weights=begun, target_modules=["q_proj"])
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=f"init_lora_weights is '{begun}'.*path_initial_model_for_weight_conversion"):
        load_adapters(tiny_model(attention=None), {"a": tmp_path / "adapter"})
    with pytest.raises(UserError, match=f"init_lora_weights is '{begun}'"):
        attach_lora(tiny_model(), rank=2, alpha=8, target_modules=("q_proj",), init_from=tmp_path / "adapter")


def test_a_converted_one_is_loaded_and_gives_what_peft_gives(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights="pissa", target_modules=["q_proj"])
    model: Any = get_peft_model(tiny_model(attention=None), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    model.peft_config["default"].init_lora_weights = "pissa"
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.eval()(ids).logits
    model.save_pretrained(str(tmp_path / "adapter"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = load_adapters(tiny_model(attention=None), {"a": tmp_path / "adapter"})
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=1e-4)  # fp32, W - BA + BA


@pytest.mark.parametrize("begun", [None, False, "gaussian", "orthogonal", "eva"])
def test_other_beginnings_leave_the_base_as_it_is(begun: Any, adapter: Path) -> None:
    change(adapter, init_lora_weights=begun)
    assert len(read_adapter(adapter)[1]) == 14


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not supported"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"target_parameters": ["mlp.gate.weight"]}, "target_parameters names 'mlp.gate.weight', which is not"),
        ({"target_parameters": [{}]}, r"target_parameters names \{\}, which is not"),
        ({"target_parameters": "down_proj"}, "target_parameters is 'down_proj', expected list"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"megatron_config": {"a": 1}}, "megatron_config is"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"of_a_later_peft": {"x": 1}}, "of_a_later_peft is"),
        ({"r": "8"}, "r is '8', expected int"),
        ({"r": 0}, "r is 0, expected at least 1"),
        ({"r": True}, "r is True, expected int"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected int or float"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan, expected a finite number"),
        ({"lora_alpha": 1e300}, r"lora_alpha is 1e\+300, expected a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*expected a finite number"),
        ({"lora_dropout": 2}, "lora_dropout is 2, expected a number from 0 to 1"),
        ({"use_dora": "yes"}, "use_dora is 'yes', expected bool"),
        ({"target_modules": 3}, "target_modules is 3, expected list or str"),
        ({"target_modules": [{}]}, "PEFT does not accept these settings"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, expected str"),
        ({"init_lora_weights": ["x" * 10**6]}, "init_lora_weights is .{,250}, which takes a part"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(settings: dict[str, Any], text: str, adapter: Path) -> None:
    change(adapter, **settings)
    with pytest.raises(UserError, match=f"{CONFIG}: {text}"):
        read_adapter(adapter)


@pytest.mark.parametrize("text", ["", "[1]", "3", "null", "[" * 10**5, '{"a":' * 10**5, '{"r": ' + "9" * 5000 + "}"])
def test_a_config_of_any_form_is_refused_in_one_paragraph(
    text: str, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / CONFIG).write_text(text)
    for command in (["merge", str(adapter), str(adapter.parent / "out")], ["generate", str(adapter), "--prompt", "w6"]):
        assert invoke(command) == 2
        said = capsys.readouterr().err
        assert CONFIG in said and "Traceback" not in said and len(said) < 1000
    assert not (adapter.parent / "out").exists()


def _without_one(tensors: dict[str, Any]) -> None:
    del tensors[min(tensors)]


def _without_a_layer(tensors: dict[str, Any]) -> None:
    for key in sorted(tensors)[:2]:
        del tensors[key]


def _nan(tensors: dict[str, Any]) -> None:
    tensors[max(tensors)][0, 0] = math.nan


def _other_rank(tensors: dict[str, Any]) -> None:
    tensors[min(tensors)] = torch.zeros(3, 64)


def _integers(tensors: dict[str, Any]) -> None:
    tensors[min(tensors)] = tensors[min(tensors)].long()


def _other_width(tensors: dict[str, Any]) -> None:
    tensors[min(tensors)] = torch.zeros(2, 7)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_without_one, "the weights of model.layers.0.mlp.down_proj are"),
        (_without_a_layer, "asks for 13 layers, PEFT adapts 14.*instead model.layers.0.mlp.down_proj"),
        (_nan, "v_proj.lora_B.weight has values that are NaN or infinite"),
        (_other_rank, r"lora_A': \(3, 64\)"),
        (_integers, "is not a LoRA weight"),
        (_other_width, "the adapter does not fit this base"),
        (dict.clear, "holds no weights"),
    ],
)
def test_damaged_weights_end_generate_and_merge_and_nothing_is_written(
    damage: Callable[[dict[str, Any]], None], text: str, adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(adapter / WEIGHTS)
    damage(tensors)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(UserError, match=text):
        load_adapters(tiny_model(attention=None), {"a": adapter})
    assert invoke(["merge", str(adapter), str(adapter.parent / "out"), "--onto", "base"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (adapter.parent / "out").exists()


def test_targets_that_the_base_lacks_are_named(adapter: Path) -> None:
    change(adapter, target_modules=["no_proj"])
    with pytest.raises(UserError, match=r"does not fit this base: .*no_proj"):
        load_adapters(tiny_model(attention=None), {"a": adapter})


def test_targets_that_peft_rewrites_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    attach = lora.get_peft_model

    def rewriting(model: Any, config: Any, **options: Any) -> Any:
        config.target_modules = {"q_proj", "up_proj"}
        return attach(model, config, **options)

    monkeypatch.setattr(lora, "get_peft_model", rewriting)
    with pytest.raises(UserError, match=r"asks for 4 layers, PEFT adapts 4.*not model.*k_proj.*instead model.*up_proj"):
        attach_lora(tiny_model(), rank=2, alpha=4, target_modules=("q_proj", "k_proj"))


# --- values that are not finite ---------------------------------------------------------------------------------------


def load(folder: Path, quantization: Any, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(
        str(folder), quantization=quantization, double_quant=True, compute_dtype=dtype, attention=INFERENCE, device=CPU
    )


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_base_with_values_that_are_not_finite_is_refused_by_the_name_of_the_tensor(
    key: str, value: float, quantization: Any, base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors[key].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{key.removesuffix('weight')}.* has values that are NaN or infinite"):
        load(folder, quantization)


def test_a_quantization_kernel_that_skips_nan_hides_none(monkeypatch: pytest.MonkeyPatch) -> None:
    original = bitsandbytes.functional.quantize_4bit

    def skipping(weights: torch.Tensor, **options: Any) -> Any:
        return original(weights.nan_to_num(), **options)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", skipping)
    weights = torch.randn(128)
    codes, part = torch.empty(64, 1, dtype=torch.uint8), Range(0, 128)
    assert quantize_range(codes, lambda a, b: weights[a:b], part, "nf4", torch.float32).isfinite().all()
    weights[3] = math.nan
    assert quantize_range(codes, lambda a, b: weights[a:b], part, "nf4", torch.float32).isnan().any()


def test_rope_that_divides_by_zero_is_named(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = 0.0
    config.get("rope_parameters", {})["rope_theta"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"rope_theta is 0.0; expected a positive number"):
        load(folder, "nf4")


def test_masks_may_hold_minus_infinity(base: Path) -> None:
    model = load(base, "nf4")
    model.register_buffer("mask", torch.full((3,), -math.inf))
    assert non_finite_tensor(model) is None
    model.mask[1] = math.nan
    assert non_finite_tensor(model) == "mask"


def test_a_merge_that_overflows_its_type_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    for key in tensors:
        tensors[key].fill_(300.0)
    save_file(tensors, adapter / WEIGHTS)
    out = adapter.parent / "out"
    assert invoke(["merge", str(adapter), str(out), "--onto", "base", "--dtype", "float16"]) == 2
    said = capsys.readouterr().err
    assert "is not finite when it is merged in torch.float16" in said and "Nothing was written" in said
    assert not out.exists()
