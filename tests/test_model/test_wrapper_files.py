"""A wrapper that is written: the base's files with other tensors where the text model is, and its config."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import OTHER_TOWERS, WRAPPED, tiny_wrapper
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from qlora_dist.config.wrappers import WRAPPERS, Wrapper
from qlora_dist.errors import UserError
from qlora_dist.model import load_base
from qlora_dist.model.text_part import _check_logits, text_config_of, text_part_of
from qlora_dist.model.weights.wrapper_files import write_wrapper

BESIDE = (IMAGE_PROCESSOR_NAME, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
INDEX = "model.safetensors.index.json"


def files_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WRAPPED)
@pytest.mark.parametrize("shard", ["60KB", "1GB"])
def test_a_text_model_goes_back_into_the_files_that_it_came_from(family: str, shard: str, tmp_path: Path) -> None:
    """Unchanged, each file is the base's; changed, each tensor of the text model and no other is changed."""
    base, same, other = (tmp_path / name for name in ("base", "same", "other"))
    tiny_wrapper(family).save_pretrained(base, max_shard_size=shard)
    config = json_of(base / "config.json")
    for part in (config, config["text_config"]):  # as older versions of transformers wrote them
        part["torch_dtype"] = part.pop("dtype", "float32")
    (base / "config.json").write_text(json.dumps(config))
    for number, name in enumerate(BESIDE):
        (base / name).write_text(f'{{"number": {number}}}')
    settings: dict[str, Any] = {"compute_dtype": torch.float32, "attention": "sdpa", "double_quant": True}
    model = load_base(str(base), quantization="none", device=torch.device("cpu"), **settings)
    before = files_of(base)
    for out in (same, other):
        out.mkdir()
        write_wrapper(model, model.state_dict().__getitem__, str(base), None, out, torch.float32)
        assert [(name, one.keys()) for name, one in files_of(out).items()] == [
            (name, one.keys()) for name, one in before.items()
        ]
        for name, tensors in files_of(out).items():
            for key, value in tensors.items():
                is_text = not any(tower in key for tower in OTHER_TOWERS)
                assert torch.equal(value, before[name][key]) == (out == same or not is_text), key
        with torch.no_grad():
            for parameter in {id(one): one for one in model.parameters()}.values():
                parameter.add_(1.0)
    assert (same / INDEX).exists() == (base / INDEX).exists() == (shard == "60KB")
    if (base / INDEX).exists():
        assert len(before) > 2
        assert json_of(same / INDEX)["weight_map"] == json_of(base / INDEX)["weight_map"]
        total = sum(value.nbytes for tensors in before.values() for value in tensors.values())
        assert json_of(same / INDEX)["metadata"]["total_size"] == total
    assert all((same / name).read_bytes() == (base / name).read_bytes() for name in BESIDE)
    found = json_of(same / "config.json")
    for part, own in ((config.pop("text_config"), found.pop("text_config")), (config, found)):
        del part["torch_dtype"]
        assert own == {**part, "dtype": "float32"}
    assert json_of(same / "generation_config.json")["eos_token_id"] == model.generation_config.eos_token_id


# --- the text model's config ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WRAPPERS)
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id", "dtype", "quantization_config"])
def test_what_holds_for_the_whole_file_holds_for_the_text_model(family: str, key: str) -> None:
    """And where the file does not say, the text model's own word is kept; what is given is not changed."""
    config: Any = AutoConfig.for_model(family, name_or_path="somewhere")
    for whole, own in ((7, 5), (7, None), (None, 5))[: 2 if key == "quantization_config" else 3]:
        values = {"dtype": (torch.float16, torch.bfloat16), "quantization_config": ({"a": 1}, {"b": 2})}
        value: dict[Any, Any] = dict(zip((7, 5), values.get(key, (7, 5)), strict=True))
        setattr(config, key, value.get(whole))
        setattr(config.get_text_config(), key, value.get(own))
        before = dict(vars(config)), dict(vars(config.get_text_config()))
        text = text_config_of(config)
        assert getattr(text, key) == value[whole if whole is not None else own]
        assert text.name_or_path == "somewhere"
        assert (vars(config), vars(config.get_text_config())) == before


@pytest.mark.parametrize("more", [{}, {"mrope_section": [2, 3, 3]}, {"mrope_interleaved": True}])
@pytest.mark.parametrize("family", [key for key, one in WRAPPERS.items() if one.stand_in is not None])
def test_positions_in_three_dimensions_become_plain_ones_however_the_file_spells_them(
    family: str, more: dict[str, Any]
) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        for kind in ({"type": "mrope"}, {"rope_type": "mrope"}, {"type": "mrope", "rope_type": "default"}):
            for theta in (1e4, 5e5):
                config: Any = AutoConfig.for_model(family, text_config={key: {**kind, **more, "rope_theta": theta}})
                found = text_config_of(config).rope_parameters
                assert found == {"rope_theta": theta, "rope_type": "default"}, (key, kind)


@pytest.mark.parametrize("value", [None, 1.0, 0.5, 30.0])
@pytest.mark.parametrize("key", ["final_logit_softcapping", "logits_scaling", "logit_scale"])
def test_logits_that_a_text_model_would_change_are_refused(key: str, value: float | None) -> None:
    text: Any = SimpleNamespace(**{key: value})
    if value in (None, 1.0):
        _check_logits("x", "llava", text)
    else:
        with pytest.raises(UserError, match=f"sets {key} to {value}"):
            _check_logits("x", "llava", text)


@pytest.mark.parametrize(("family", "stand_in"), [("qwen2_vl", "llama"), ("llava", "qwen2")])
def test_weights_that_only_one_of_the_two_classes_has_are_found(
    family: str, stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases: left over in the wrapper, or missing from it."""
    config = tiny_wrapper(family).config
    part = text_part_of("x", config)
    assert part is not None and part.num_left_out > 0
    monkeypatch.setitem(WRAPPERS, family, Wrapper(WRAPPERS[family].text_type, is_tied=False, stand_in=stand_in))
    with pytest.raises(UserError, match=r"bias of \w+ is not the same weight in \w+ \(6 such weights\)"):
        text_part_of("x", config)
