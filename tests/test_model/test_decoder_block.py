"""The decoder layer as three functions computes what transformers' layer with PEFT's adapters computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import random_batch, save_model, tiny_model
from peft import LoraConfig
from torch import Tensor

from qlora_dist.config import joint_products
from qlora_dist.model import decoder_block, gate_gradients, hidden_states, load_base, raised_gradients, set_recompute
from qlora_dist.model.decoder_block import use_decoder_blocks
from qlora_dist.model.forward import decoder_layers
from qlora_dist.model.kernels import gradients
from qlora_dist.model.lora import attach_lora, lora_layers, trainable_parameters
from qlora_dist.model.products import SharedInput

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral with windows": ("mistral", {}),
    "qwen2 with biases": ("qwen2", {}),
    "qwen3 with norms of heads": ("qwen3", {}),
    "granite with factors": ("granite", {}),
    "smollm3 with a layer without positions": ("smollm3", {
        "num_key_value_heads": 2, "no_rope_layers": [1, 0], "use_sliding_window": False, "num_hidden_layers": 2,
    }),
}  # fmt: skip


def adapted(family: str, targets: tuple[str, ...], dtype: torch.dtype, **changes: Any) -> torch.nn.Module:
    """A base with adapters that are not zero, with PEFT's own forward pass."""
    model = attach_lora(tiny_model(family, **changes), rank=4, alpha=8, target_modules=targets, kernels="off")
    fill_b(model)
    return model.to(dtype).train()


def fill_b(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def outcome(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Hidden states, gradients of the adapters, and the gradient of the first layer's input."""
    batch = random_batch((9, 5, 6))
    inputs: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Tensor) -> Tensor:
        inputs.append(out.detach().requires_grad_())
        return inputs[0]

    handle = model.get_base_model().get_input_embeddings().register_forward_hook(keep)
    out = hidden_states(model, batch)
    handle.remove()
    model.zero_grad()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    assert all(grad is not None for grad in gradients.values()) and inputs[0].grad is not None
    return out.detach(), gradients, inputs[0].grad


def uses_blocks(model: torch.nn.Module) -> bool:
    return any(hasattr(layer, "plain_class") for layer in decoder_layers(model))


def assert_equal_outcomes(found: Any, expected: Any, tolerance: float) -> None:
    for left, right in (
        (found[0], expected[0]), (found[2], expected[2]), *((found[1][name], expected[1][name]) for name in expected[1])
    ):  # fmt: skip
        assert right.abs().max() > 1e-3, "nothing is compared"
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance * float(right.abs().max()))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj"), ("o_proj",)])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_autograd_of_the_plain_layers_in_fp64(form, targets, recompute):
    family, changes = FORMS[form]
    model = adapted(family, targets, torch.float64, **changes)
    expected = outcome(model)
    assert use_decoder_blocks(model) == len(decoder_layers(model)) == 2
    set_recompute(model, recompute)
    # RMSNorm of transformers computes in fp32 whatever its input: relative errors of 2^-24, over a few layers
    assert_equal_outcomes(outcome(model), expected, 1e-5)


def test_a_recomputed_block_keeps_its_input_alone():
    """The test above would pass without recomputation: here the saved tensors are counted."""
    model = adapted("llama", ALL, torch.float32)
    use_decoder_blocks(model)
    saved: dict[str, int] = {}
    for level in ("none", "full"):
        set_recompute(model, level)
        saved[level] = 0

        def count(tensor: Tensor, level: str = level) -> Tensor:
            saved[level] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            hidden_states(model, random_batch((9, 5)))
    rows, inner = 14 * 64 * 4, 14 * 128 * 4
    assert saved["full"] < 2 * 2 * rows + 4 * rows  # the layers' inputs, the last norm's, and small tables
    assert saved["none"] > 2 * (4 * rows + 2 * inner)


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "up_proj")])
def test_products_of_one_matrix_at_a_time_give_the_same(targets, monkeypatch):
    model = adapted("llama", targets, torch.float64)
    use_decoder_blocks(model)
    expected = outcome(model)
    monkeypatch.setattr(joint_products, "LARGEST_MATRIX", 1)
    assert joint_products.split_product([3, 2, 2], 5) == [(0, 1), (1, 2), (2, 3)]
    assert_equal_outcomes(outcome(model), expected, 1e-12)


def test_the_gates_gradient_in_parts_and_in_calls_of_few_tokens_is_the_same(monkeypatch):
    """As on a GPU, where programs sum parts."""
    model = adapted("llama", ALL, torch.float64)
    use_decoder_blocks(model)
    expected = outcome(model)
    monkeypatch.setattr(gate_gradients, "TOKENS_OF_CALL", 8)  # of 20
    monkeypatch.setattr(gate_gradients, "num_parts", lambda tokens, width: (2, 1))
    monkeypatch.setattr(gate_gradients, "is_fake", lambda tensor: True)
    assert_equal_outcomes(outcome(model), expected, 1e-12)


def test_raised_gradients_in_parts_and_in_calls_of_few_tokens_are_the_same(monkeypatch):
    model = adapted("qwen3", ALL, torch.float64)
    use_decoder_blocks(model)
    expected = outcome(model)
    num_parts = []

    def num_raised(tokens, outputs):
        columns, _ = joint_products.num_raised(tokens, outputs)
        num_parts.append((columns, len(outputs)))
        return columns, 2

    monkeypatch.setattr(raised_gradients, "TOKENS_OF_CALL", 8)  # of 20
    monkeypatch.setattr(raised_gradients, "num_raised", num_raised)
    monkeypatch.setattr(raised_gradients, "is_fake", lambda tensor: True)
    for module, name, value in (
        (joint_products, "COLUMNS_OF_RAISED", 16), (gradients, "COLUMNS_OF_RAISED", 16), (gradients, "ROWS_OF_STEP", 4),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    assert_equal_outcomes(outcome(model), expected, 1e-12)
    assert any(columns > layers > 1 for columns, layers in num_parts)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_layers_gradient_is_written_where_the_layer_below_multiplies_it(recompute, monkeypatch):
    """No copy in any layer, and bit for bit what a copy gives."""
    model = adapted("llama", ALL, torch.float64)
    set_recompute(model, recompute)
    use_decoder_blocks(model)
    found = []

    def widened(grad, columns):
        found.append(raised_gradients.widened(grad, columns))
        return found[-1]

    monkeypatch.setattr(decoder_block, "widened", widened)
    shared = outcome(model)
    assert len(found) == len(decoder_layers(model)) and all(one is not None for one in found)
    monkeypatch.setattr(decoder_block, "widened", lambda grad, columns: None)
    copied = outcome(model)
    assert torch.equal(shared[2], copied[2])
    assert all(torch.equal(shared[1][name], copied[1][name]) for name in shared[1])


def test_only_the_newest_gradient_with_room_is_widened():
    """Behind the rows of any other tensor may be somebody's values."""
    like = torch.zeros(3, 4)
    old, grad = (raised_gradients.with_room(like, 2) for _ in range(2))
    assert raised_gradients.widened(old, 2) is None
    joined = raised_gradients.widened(grad[None].squeeze(0).detach(), 2)
    assert joined is not None and joined.shape == (3, 6) and joined.data_ptr() == grad.data_ptr()
    assert raised_gradients.widened(grad, 3) is None and raised_gradients.widened(grad[1:], 2) is None
    assert raised_gradients.widened(grad + 0, 2) is None
    assert raised_gradients.widened(torch.zeros(3, 6)[:, :4], 2) is None
    del old, grad, joined
    assert raised_gradients.widened(torch.zeros(3, 6)[:, :4], 2) is None


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
def test_a_quantized_base_gives_what_its_layers_give(quantization, tmp_path):
    save_model(tmp_path, tiny_model(attention=None), tokenizer=False)
    found = []
    for kernels in ("auto", "reference"):
        base = load_base(str(tmp_path), quantization=quantization, double_quant=quantization == "nf4",
                         compute_dtype=torch.float32, attention="auto", device=torch.device("cpu"))  # fmt: skip
        model = attach_lora(base, rank=4, alpha=8, kernels=kernels).train()
        assert uses_blocks(model) == (kernels == "auto")
        fill_b(model)
        found.append(outcome(model))
    assert_equal_outcomes(*found, 1e-5)  # fp32 sums of up to 128 products in another order


def test_in_bfloat16_no_result_is_further_from_fp64_than_the_plain_layers():
    exact = outcome(adapted("llama", ALL, torch.float64))
    errors = []
    for is_block in (True, False):
        model = adapted("llama", ALL, torch.float64).to(torch.bfloat16)
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data.float()
        if is_block:
            use_decoder_blocks(model)
        errors.append(relative_errors(outcome(model), exact))
    ours, theirs = errors
    # single values differ by chance; over all values of a tensor rounding less often must show
    assert sum(ours.values()) < sum(theirs.values())
    assert all(ours[name] < 1.15 * theirs[name] for name in theirs), (ours, theirs)


def relative_errors(found: Any, exact: Any) -> dict[str, float]:
    pairs = {"hidden": (found[0], exact[0]), "input": (found[2], exact[2])}
    pairs |= {name: (found[1][name], exact[1][name]) for name in exact[1]}
    return {name: float((left.double() - right).norm() / right.norm()) for name, (left, right) in pairs.items()}


def test_an_update_far_below_the_rounding_of_the_result_keeps_its_size():
    """LoRA starts at B = 0: added to a bf16 result, the first updates are lost (here 2^-13 of the result)."""
    torch.manual_seed(0)
    base = torch.nn.Linear(256, 512, bias=False).to(torch.bfloat16).requires_grad_(False)
    a, b = torch.randn(8, 256), torch.randn(512, 8)
    b *= 2**-13 * float(base.weight.float().norm() / (b @ a).norm())
    layer = torch.nn.Module()
    layer.base_layer, layer.active_adapters, layer.scaling = base, ["default"], {"default": 1.0}
    layer.lora_A = {"default": torch.nn.Linear(256, 8, bias=False)}
    layer.lora_B = {"default": torch.nn.Linear(8, 512, bias=False)}
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    x = torch.randn(4096, 256).to(torch.bfloat16)
    group = SharedInput([layer])
    joined, first = group.input_buffer(x)
    first.copy_(x)
    group.lower(joined)
    plain = torch.nn.functional.linear(x, base.weight)
    update = x.double() @ (b @ a).t().double()

    def gain(result: Tensor) -> float:
        """How much of the update is in the difference to the base's result: 1 is all of it."""
        return float(((result - plain).double() * update).sum() / update.square().sum())

    added = torch.addmm(plain, x @ a.to(x.dtype).t(), b.to(x.dtype).t())
    assert gain(added) < 0.5 and abs(gain(group.product(joined)) - 1) < 0.1


def test_what_is_not_a_packed_batch_with_one_adapter_takes_the_layers_own_forward_pass(monkeypatch):
    model = adapted("llama", ALL, torch.float32)
    batch = random_batch((9, 5))
    with torch.no_grad(), model.disable_adapter():
        expected = hidden_states(model, batch)
    use_decoder_blocks(model)
    calls = count_calls(monkeypatch)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(hidden_states(model, batch), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden_states(model, batch)
    assert not calls
    with torch.no_grad():
        hidden_states(model, batch)
    assert len(calls) == 2


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    real = decoder_block.read_block
    monkeypatch.setattr(decoder_block, "read_block", lambda layer: (calls.append(None), real(layer))[1])
    return calls


@pytest.mark.parametrize(
    "model",
    [lambda: tiny_model("gemma"), lambda: tiny_model("olmo2"), lambda: tiny_model("llama", hidden_act="gelu"),
     lambda: tiny_model("llama", mlp_bias=True), lambda: tiny_model("llama", attention_bias=True)],
    ids=["gemma", "olmo2", "gelu", "bias of the MLP", "bias of the output"],
)  # fmt: skip
def test_layers_of_another_form_keep_their_forward_pass(model):
    assert use_decoder_blocks(model().requires_grad_(False)) == 0
    assert use_decoder_blocks(tiny_model("llama").requires_grad_(False)) == 2
    assert use_decoder_blocks(tiny_model("llama")) == 0, "its base is trained"


def test_dropout_keeps_the_layers_forward_pass():
    assert not uses_blocks(attach_lora(tiny_model(), rank=4, alpha=8, dropout=0.1))
    assert uses_blocks(attach_lora(tiny_model(), rank=4, alpha=8))


def test_an_adapter_that_lacks_layers_of_another_and_scales_that_differ_are_as_in_the_plain_layers():
    """Two adapters of one base, each on layers of its own; then one with a scale of its own in one layer."""
    model = adapted("llama", ("q_proj", "down_proj"), torch.float64)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules=["k_proj", "gate_proj", "up_proj"]))
    model.double()
    batch = random_batch((9, 5))
    for name in ("default", "other"):
        model.set_adapter(name)
        for key, parameter in trainable_parameters(model).items():
            if f"lora_B.{name}" in key:
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    expected = {}
    for is_block in (False, True):
        if is_block:
            assert use_decoder_blocks(model) == 2
        for name in ("default", "other"):
            model.set_adapter(name)
            with torch.no_grad():
                found = hidden_states(model, batch)
            torch.testing.assert_close(found, expected.setdefault(name, found), rtol=0, atol=1e-5)
    assert (expected["default"] - expected["other"]).abs().max() > 1e-3

    layer = lora_layers(model)["model.layers.0.mlp.up_proj"]
    layer.scaling["other"] *= 3
    with torch.no_grad():
        found = hidden_states(model, batch)
        for one in decoder_layers(model):
            one.__class__ = one.plain_class
        torch.testing.assert_close(found, hidden_states(model, batch), rtol=0, atol=1e-5)
        assert (found - expected["other"]).abs().max() > 1e-3
