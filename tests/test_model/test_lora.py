"""LoRA: what is adapted, counted, computed, saved, reloaded."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_batch, save_model, tiny_model
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from qlora_dist.errors import RunFailed, UserError
from qlora_dist.model import INFERENCE, base_checksum, hidden_states, linear_layers, load_base, output_head
from qlora_dist.model.base_weights import same_bits
from qlora_dist.model.dropout import dropout_rows
from qlora_dist.model.lora import (
    activate,
    attach_lora,
    combine_adapters,
    count_parameters,
    load_adapters,
    lora_layers,
    trainable_parameters,
)
from qlora_dist.model.lora_files import (
    CONFIG,
    WEIGHTS,
    adapter_state,
    load_adapter_weights,
    read_adapter_config,
    save_adapter,
    verify_adapter_file,
)

CPU = torch.device("cpu")


def nf4_base(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "auto") -> Any:
    return load_base(
        str(folder), quantization="nf4", double_quant=True, compute_dtype=dtype, attention=attention, device=CPU
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


def set_b_values(model: torch.nn.Module, seed: int = 0) -> None:
    """B starts at zero; with other values the adapter changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def outputs_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    hidden = hidden_states(model, random_batch((9, 5)))
    hidden.float().square().mean().backward()
    gradients = {}
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return hidden.detach(), gradients


# --- what is adapted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_all_linear_adapts_every_linear_layer_except_the_head(family: str, quantization: Any, tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(family, attention=None))
    base = load_base(
        str(tmp_path),
        quantization=quantization,
        double_quant=False,
        compute_dtype=torch.bfloat16,
        attention="auto",
        device=CPU,
    )
    expected = set(linear_layers(base))
    model = attach_lora(base, rank=2, alpha=4)
    assert set(lora_layers(model)) == expected and len(expected) >= 8
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert "lora_" not in name or parameter.dtype == torch.float32


def test_names_select_layers_and_a_name_without_a_match_is_rejected() -> None:
    model = attach_lora(tiny_model(), rank=2, alpha=4, target_modules=("q_proj", "layers.1.mlp.up_proj"))
    assert set(lora_layers(model)) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    for name in ("q_prj", "proj"):  # a part of a name's last part is no name
        with pytest.raises(UserError, match=f"{name} matches no linear layer; available: down_proj, gate_proj"):
            attach_lora(tiny_model(), rank=2, alpha=4, target_modules=(name,))


def test_saved_targets_are_short_and_never_match_the_head(tmp_path: Path) -> None:
    save_adapter(attach_lora(tiny_model("phi"), rank=2, alpha=4), tmp_path, "some/base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "some/base" and config["lora_alpha"] == 4


def test_distilgpt2_has_82_million_weights_and_589824_trainable_ones() -> None:
    from helpers.tiny_models import tiny_config
    from transformers import AutoModelForCausalLM

    config = tiny_config("gpt2", vocab_size=50257, n_positions=1024, n_embd=768, n_layer=6, n_head=12)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    adapted = attach_lora(model, rank=8, alpha=16, target_modules=("c_attn", "c_proj", "c_fc"))
    base, trainable = count_parameters(adapted)
    assert (base, trainable) == (81_912_576, 589_824)
    assert base + trainable == 82_502_400
    assert round(100 * trainable / (base + trainable), 4) == 0.7149


def test_packed_weights_count_as_the_weights_they_contain(folder: Path) -> None:
    plain, _ = count_parameters(tiny_model())
    assert count_parameters(nf4_base(folder)) == (plain, 0)
    base, trainable = count_parameters(attach_lora(nf4_base(folder), rank=2, alpha=4))
    assert base == plain
    assert trainable == sum(2 * sum(layer.weight.shape) for layer in linear_layers(tiny_model()).values())


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_the_lean_forward_equals_pefts_in_values_and_gradients(family: str, variant: Any, tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(family, attention=None))
    results = []
    for kernels in ("reference", "off"):
        model = attach_lora(nf4_base(tmp_path), rank=4, alpha=8, variant=variant, kernels=kernels, seed=3)
        is_lean = any("forward" in vars(layer) for layer in lora_layers(model).values())
        assert is_lean == (kernels == "reference" and variant != "dora")
        set_b_values(model)
        results.append(outputs_and_gradients(model.train()))
    (ours, our_gradients), (pefts, peft_gradients) = results
    torch.testing.assert_close(ours, pefts, atol=1e-6, rtol=1e-6)  # fp32: the sum is rounded at another point
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, peft_gradients[name], atol=1e-6, rtol=1e-5)  # sums over 14 tokens


def test_in_bfloat16_masters_and_gradients_stay_fp32(folder: Path) -> None:
    model = attach_lora(nf4_base(folder, torch.bfloat16), rank=4, alpha=8)
    set_b_values(model)
    hidden, gradients = outputs_and_gradients(model.train())
    assert hidden.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(gradient.any() for gradient in gradients.values())
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}


def test_the_scale_is_alpha_over_rank_and_alpha_over_its_root_for_rslora() -> None:
    for alpha in (16, 2.5, 0.5):
        for variant, expected in (("lora", alpha / 4), ("rslora", alpha / 4**0.5)):
            model = attach_lora(tiny_model(), rank=4, alpha=alpha, variant=variant)  # type: ignore[arg-type]
            assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {expected}


def test_a_new_adapter_changes_nothing_and_switching_it_off_gives_the_base(folder: Path) -> None:
    batch = random_batch((9, 5))
    with torch.no_grad():
        before = hidden_states(nf4_base(folder), batch)
        model = attach_lora(nf4_base(folder), rank=4, alpha=8).eval()
        assert torch.equal(hidden_states(model, batch), before)
        set_b_values(model)
        assert (hidden_states(model, batch) - before).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(hidden_states(model, batch), before)


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    model = attach_lora(tiny_model(), rank=4, alpha=8, dropout=0.5)
    set_b_values(model)
    batch = random_batch((9, 5))
    dropout_rows(model).rows = ((14, 1),)
    with torch.no_grad():
        assert torch.equal(hidden_states(model.eval(), batch), hidden_states(model, batch))
        first = hidden_states(model.train(), batch)
        assert torch.equal(first, hidden_states(model, batch))  # a function of the rows' seeds
        assert not torch.equal(first, hidden_states(model.eval(), batch))
        dropout_rows(model.train()).rows = ((14, 2),)
        assert not torch.equal(first, hidden_states(model, batch))


def test_the_seed_determines_a_and_the_global_generator_is_untouched() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    states = []
    for seed in (1, 1, 2):
        base = tiny_model()
        torch.manual_seed(11)
        states.append(adapter_state(attach_lora(base, rank=2, alpha=4, seed=seed)))
        assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_training_changes_the_adapter_but_not_one_bit_of_the_base(folder: Path) -> None:
    model = attach_lora(nf4_base(folder, torch.bfloat16), rank=4, alpha=8).train()
    before, start = base_checksum(model), adapter_state(model)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        outputs_and_gradients(model)
        optimizer.step()
    assert base_checksum(model) == before == base_checksum(nf4_base(folder, torch.bfloat16))
    assert all(not torch.equal(value, start[key]) for key, value in adapter_state(model).items())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_a_saved_adapter_loads_with_stock_peft_and_gives_the_same_logits(
    variant: Any, folder: Path, tmp_path: Path
) -> None:
    model = attach_lora(nf4_base(folder), rank=4, alpha=8, variant=variant, dropout=0.1)
    set_b_values(model)
    save_adapter(model, tmp_path, str(folder))
    verify_adapter_file(model, tmp_path, must_be_trained=True)
    stock = PeftModel.from_pretrained(nf4_base(folder, attention=INFERENCE), str(tmp_path)).eval()
    batch = random_batch((8,))
    with torch.no_grad():
        ours = output_head(model.eval()).logits(hidden_states(model, batch))
        theirs = stock(input_ids=batch.input_ids).logits[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)  # fp32, another attention kernel


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_keys_and_values_match_what_peft_saves(variant: Any) -> None:
    model = attach_lora(tiny_model(), rank=2, alpha=4, variant=variant)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = adapter_state(model)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_equal_adapters_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapter(attach_lora(tiny_model(), rank=2, alpha=4), tmp_path / name, "base")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [CONFIG, WEIGHTS]


def test_wrappers_leave_no_trace_in_saved_names(tmp_path: Path) -> None:
    model = attach_lora(tiny_model(), rank=2, alpha=4)
    expected = adapter_state(model)
    assert all(key.startswith("base_model.model.model.layers.") for key in expected)

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.module = inner

    layer = model.get_base_model().model.layers[0]
    layer.mlp = Wrapper(layer.mlp)
    wrapped = Wrapper(model)
    assert any(".mlp.module." in name for name, _ in wrapped.named_parameters())
    assert list(adapter_state(wrapped)) == list(expected)
    assert not any("module." in name for name in trainable_parameters(wrapped))


def test_reloading_is_in_place_and_strict(tmp_path: Path) -> None:
    source = attach_lora(tiny_model(), rank=2, alpha=4, seed=1)
    set_b_values(source)
    save_adapter(source, tmp_path / "good", "base")
    target = attach_lora(tiny_model(), rank=2, alpha=4, seed=2)
    views = {name: parameter.data for name, parameter in trainable_parameters(target).items()}
    load_adapter_weights(target, tmp_path / "good")
    assert all(torch.equal(value, adapter_state(source)[key]) for key, value in adapter_state(target).items())
    assert all(
        parameter.data.data_ptr() == views[name].data_ptr() for name, parameter in trainable_parameters(target).items()
    )

    weights = load_file(tmp_path / "good" / WEIGHTS)
    (tmp_path / "bad").mkdir()

    def load_changed(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, tmp_path / "bad" / WEIGHTS)
        load_adapter_weights(target, tmp_path / "bad")

    first = min(weights)
    with pytest.raises(UserError, match=f"1 missing, first {first}"):
        load_changed({key: value for key, value in weights.items() if key != first})
    with pytest.raises(UserError, match="1 unexpected, first extra"):
        load_changed({**weights, "extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"has shape \(1,\), expected \(2, "):
        load_changed({**weights, first: torch.zeros(1)})
    (tmp_path / "bad" / WEIGHTS).write_bytes(b"cut off")
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_adapter_weights(target, tmp_path / "bad")
    with pytest.raises(UserError, match=f"no {WEIGHTS} here"):
        load_adapter_weights(target, tmp_path / "absent")


def test_a_file_that_differs_in_one_bit_or_has_no_effect_fails_the_check(tmp_path: Path) -> None:
    model = attach_lora(tiny_model(), rank=2, alpha=4)
    save_adapter(model, tmp_path, "base")
    verify_adapter_file(model, tmp_path)
    with pytest.raises(RunFailed, match="every lora_B is zero"):
        verify_adapter_file(model, tmp_path, must_be_trained=True)
    weights = load_file(tmp_path / WEIGHTS)
    key = random.Random(0).choice(sorted(weights))
    flipped = copy.deepcopy(weights)
    flipped[key].view(torch.int32)[0] ^= 1
    negative = copy.deepcopy(weights)
    zero = next(name for name in sorted(weights) if "lora_B" in name)
    negative[zero].neg_()  # of a zero this is one bit, too
    for changed, name in ((flipped, key), (negative, zero)):
        save_file(changed, tmp_path / WEIGHTS)
        with pytest.raises(RunFailed, match=f"in memory in 1 of 28 tensors, first {name}"):
            verify_adapter_file(model, tmp_path)


def test_values_that_are_not_numbers_are_equal_to_themselves() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    assert same_bits(nan, nan.clone()) and not same_bits(nan, torch.tensor([torch.nan, 2.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


def test_training_can_only_start_from_an_adapter_of_the_same_shape(tmp_path: Path) -> None:
    source = attach_lora(tiny_model(), rank=2, alpha=4, seed=1)
    set_b_values(source)
    save_adapter(source, tmp_path, "base")
    started = attach_lora(tiny_model(), rank=2, alpha=4, init_from=tmp_path)
    assert all(torch.equal(value, adapter_state(source)[key]) for key, value in adapter_state(started).items())
    for changes, message in (
        ({"rank": 4, "alpha": 4}, "lora.rank 2, the config has 4"),
        ({"rank": 2, "alpha": 8}, "lora.alpha 4, the config has 8"),
        ({"rank": 2, "alpha": 4, "variant": "rslora"}, "rslora False, the config has True"),
        ({"rank": 2, "alpha": 4, "target_modules": ("q_proj",)}, "unexpected, first"),
    ):
        with pytest.raises(UserError, match=message):
            attach_lora(tiny_model(), init_from=tmp_path, **changes)  # type: ignore[arg-type]


def test_other_kinds_of_adapter_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        read_adapter_config(tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(UserError, match="peft_type is 'PREFIX_TUNING', expected LORA"):
        read_adapter_config(tmp_path)


# --- several adapters -------------------------------------------------------------------------------------------------


def test_adapters_are_loaded_by_name_switched_and_combined_exactly(folder: Path, tmp_path: Path) -> None:
    deltas, folders = {}, {}
    for seed, name in enumerate(("first", "second")):
        model = attach_lora(tiny_model(), rank=2 + seed, alpha=4, seed=seed)
        set_b_values(model, seed)
        save_adapter(model, tmp_path / name, str(folder))
        folders[name] = tmp_path / name
        deltas[name] = {key: layer.get_delta_weight("default") for key, layer in lora_layers(model).items()}
    model = load_adapters(nf4_base(folder, attention=INFERENCE), folders)
    assert model.active_adapter == "first"
    activate(model, "second")
    assert model.active_adapter == "second"
    combine_adapters(model, {"first": 0.25, "second": -2.0})
    assert model.active_adapter == "combined"
    for key, layer in lora_layers(model).items():
        expected = 0.25 * deltas["first"][key] - 2.0 * deltas["second"][key]
        torch.testing.assert_close(layer.get_delta_weight("combined"), expected, atol=1e-6, rtol=1e-5)  # fp32 products
    with pytest.raises(UserError, match="adapter 'third' is not loaded; loaded: first, second, combined"):
        activate(model, "third")
    (tmp_path / "first" / WEIGHTS).rename(tmp_path / "first" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is pickled, which can run code"):
        load_adapters(nf4_base(folder, attention=INFERENCE), folders)
    with pytest.raises(UserError, match="cannot be combined by linear"):
        combine_adapters(model, {"first": 1.0, "second": 1.0}, "linear", "other")
