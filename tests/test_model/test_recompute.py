"""The recompute ladder and the offload of activations change memory and time, and not one bit of a gradient."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_batch, save_model, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora_dist.model import decoder_layers, hidden_states, load_base, set_recompute
from qlora_dist.model.activation_offload import ActivationOffload
from qlora_dist.model.dropout import dropout_rows
from qlora_dist.model.lora import attach_lora, trainable_parameters

CPU = torch.device("cpu")
NUM_LAYERS = 3
LEVELS: tuple[Any, ...] = ("none", 1, 2, "full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("base"), tiny_model(attention=None, num_hidden_layers=NUM_LAYERS), tokenizer=False
    )


def nf4_lora(folder: Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.bfloat16, kernels: Any = "auto") -> Any:
    base = load_base(
        str(folder),
        quantization="nf4",
        double_quant=True,
        compute_dtype=dtype,
        attention="auto",
        device=CPU,
    )
    model = attach_lora(base, rank=4, alpha=8, dropout=dropout, kernels=kernels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


class CountOps(TorchDispatchMode):
    """Counts the operators that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def forward_backward(model: Any) -> tuple[Counter[str], dict[str, torch.Tensor]]:
    """Operators of the backward pass and every gradient."""
    model.zero_grad()
    dropout_rows(model).rows = ((14, 5),)
    loss = hidden_states(model, random_batch((9, 5))).float().square().mean()
    with CountOps() as counted:
        loss.backward()
    gradients = {}
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    return counted.calls, gradients


def require_equal_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and any(gradient.any() for gradient in left.values())
    for name, gradient in left.items():
        assert torch.equal(gradient, right[name]), name


# what a product with the base costs when it is computed again: a block dequantizes, a linear layer multiplies
PRODUCT = {"auto": "bitsandbytes::dequantize_4bit", "reference": "bitsandbytes::gemm_4bit"}


@pytest.mark.parametrize(("kernels", "dropout"), [("auto", 0.0), ("reference", 0.0), ("reference", 0.3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_recompute_level_gives_the_same_bits(
    folder: Path, kernels: str, dropout: float, dtype: torch.dtype
) -> None:
    model = nf4_lora(folder, dropout=dropout, dtype=dtype, kernels=kernels)
    found, products = {}, {}
    for level in LEVELS:
        set_recompute(model, level)
        calls, found[level] = forward_backward(model)
        products[level] = calls[PRODUCT[kernels]]
        num_recomputed = {"none": 0, "full": NUM_LAYERS}.get(level, level)
        # it did recompute as much as configured: all products of a layer but the last
        assert products[level] - products["none"] == 6 * num_recomputed
    for level in LEVELS[1:]:
        require_equal_bits(found["none"], found[level])


def test_dropout_affects_these_gradients(folder: Path) -> None:
    """Without this the test above could pass with dropout that has no effect."""
    model = nf4_lora(folder, dropout=0.3)
    set_recompute(model, "full")
    _, dropped = forward_backward(model)
    _, whole = forward_backward(nf4_lora(folder))
    assert any(not torch.equal(gradient, whole[name]) for name, gradient in dropped.items())


def test_a_number_of_layers_means_the_first_ones(folder: Path) -> None:
    """The last ones are the first whose memory the backward pass frees."""
    model = nf4_lora(folder)
    for count in range(NUM_LAYERS + 1):
        set_recompute(model, count)
        expected = [index < count for index in range(NUM_LAYERS)]
        assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == expected


def test_recomputing_a_layer_skips_its_last_linear(folder: Path) -> None:
    """Of seven products with the base per layer, recomputation repeats six; with PEFT's own forward all seven."""
    calls = {}
    for kernels in ("reference", "off"):
        model = nf4_lora(folder, dtype=torch.float32, kernels=kernels)
        set_recompute(model, "full")
        calls[kernels], _ = forward_backward(model)
        # the gradient with respect to the input needs each weight once more, whatever is recomputed
        assert calls[kernels]["bitsandbytes::dequantize_4bit"] >= 7 * (NUM_LAYERS - 1)
    assert calls["reference"]["bitsandbytes::gemm_4bit"] == 6 * NUM_LAYERS
    assert calls["off"]["bitsandbytes::gemm_4bit"] == 7 * NUM_LAYERS


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_recompute_levels_agree_on_other_bases(family: str, quantization: Any, tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(family, attention=None), tokenizer=False)
    base = load_base(
        str(tmp_path),
        quantization=quantization,
        double_quant=False,
        compute_dtype=torch.bfloat16,
        attention="auto",
        device=CPU,
    )
    model = attach_lora(base, rank=4, alpha=8, dropout=0.2).train()
    found = []
    for level in ("none", "full"):
        set_recompute(model, level)
        found.append(forward_backward(model)[1])
    require_equal_bits(*found)


# --- offload ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_offloaded_activations_give_the_same_bits_at_every_level(folder: Path, level: Any) -> None:
    model = nf4_lora(folder, dropout=0.3)
    set_recompute(model, level)
    _, expected = forward_backward(model)
    offload = ActivationOffload(CPU)
    for _ in range(2):  # the second time with reused buffers
        model.zero_grad()
        dropout_rows(model).rows = ((14, 5),)
        with offload:
            loss = hidden_states(model, random_batch((9, 5))).float().square().mean()
        loss.backward()
        require_equal_bits(expected, {name: p.grad for name, p in trainable_parameters(model).items()})
    assert offload.num_offloaded > NUM_LAYERS


def test_with_recomputed_layers_only_their_inputs_move_and_buffers_are_reused(folder: Path) -> None:
    model = nf4_lora(folder)
    set_recompute(model, "full")
    offload = ActivationOffload(CPU)
    held = []
    for lengths in ((9, 5), (9, 5), (5, 4), (9, 5)):
        _through_the_layers(model, random_batch(lengths), offload)
        held.append(offload.host_bytes)
    inputs = NUM_LAYERS * 14 * 64 * 2  # layers x tokens x hidden x bytes of bfloat16
    # shorter rows fit in the buffers of longer ones
    assert held == [inputs] * 4
    assert offload.num_offloaded == 4 * NUM_LAYERS


def _through_the_layers(model: Any, batch: Any, offload: ActivationOffload) -> None:
    """Forward and backward of the decoder layers alone, with the keywords that the model passes to them."""
    layers = decoder_layers(model)
    calls: list[Any] = []
    hook = layers[0].register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        hidden_states(model, batch)
    hook.remove()
    ((states,), keywords) = calls[0]
    with offload:
        for layer in layers:
            states = layer(states, **keywords)
    states.float().sum().backward()


def test_weights_and_their_views_never_move() -> None:
    offload = ActivationOffload(CPU)
    weight = torch.nn.Parameter(torch.randn(64, 64), requires_grad=False)
    scale = torch.nn.Parameter(torch.randn(64))
    x = torch.randn(8, 64, requires_grad=True)
    with offload:
        y = torch.nn.functional.linear(x, weight) @ weight.t()  # saves the weight and a view of it
        assert (offload.num_offloaded, offload.num_kept > 0) == (0, True)
        z = y * scale  # saves y, and the weight
        assert offload.num_offloaded == 1
    z.sum().backward()
    assert offload.host_bytes == y.nbytes
    assert x.grad is not None and scale.grad is not None
    torch.testing.assert_close(scale.grad, y.detach().sum(0))


def test_a_tensor_saved_by_several_operators_is_copied_once_and_small_ones_stay() -> None:
    offload = ActivationOffload(CPU, min_bytes=1024)
    x = torch.randn(16, 64, requires_grad=True)
    small = torch.randn(4, requires_grad=True)
    with offload:
        loss = (x * x).sum() + (x.exp() * x).sum() + (small * small).sum()
    assert offload.num_offloaded == 2  # x, and exp(x)
    loss.backward()
    assert x.grad is not None and small.grad is not None
    expected = torch.autograd.grad((x * x).sum() + (x.exp() * x).sum(), x)[0]
    assert torch.equal(x.grad, expected)
    assert torch.equal(small.grad, 2 * small.detach())


class _Keep(torch.autograd.Function):
    """Saves two tensors and gives them back in the backward pass."""

    @staticmethod
    def forward(ctx: Any, one: torch.Tensor, other: torch.Tensor, found: list[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(one, other)
        ctx.found = found
        return one.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        ctx.found += ctx.saved_tensors
        one, other = ctx.saved_tensors
        return torch.zeros(one.shape), torch.zeros(other.shape), None


_VIEWS = {
    "plain": lambda y: (y, y),
    "transposed": lambda y: (y.t(), y),
    "square and its transpose": lambda y: (y[:8], y[:8].t()),
    "part": lambda y: (y[2:5], y),
    "another type": lambda y: (y, y.view(torch.int32).view(torch.float32)),
    "channels last": lambda y: (y.view(2, 8, 2, 4).to(memory_format=torch.channels_last), y),
}


@pytest.mark.parametrize("views", _VIEWS.values(), ids=_VIEWS)
def test_what_comes_back_has_the_values_and_strides_of_what_was_saved(views: Any) -> None:
    x = torch.arange(128.0).view(16, 8).requires_grad_()
    found: list[torch.Tensor] = []
    with ActivationOffload(CPU):
        saved = views(x * 1)
        loss = _Keep.apply(*saved, found)
    loss.backward()
    for ours, theirs in zip(found, saved, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype


def test_a_tensor_that_changes_in_place_is_saved_as_it_was_each_time() -> None:
    x = torch.linspace(0, 3, 64, requires_grad=True)
    with ActivationOffload(CPU):
        y = x * 1
        before = y.cos()
        after = y.add_(1).cos()
        loss = (before + after).sum()
    loss.backward()
    assert x.grad is not None
    values = x.detach()
    torch.testing.assert_close(x.grad, -values.sin() - (values + 1).sin())


def test_offload_rejects_a_device_without_an_index() -> None:
    """`cuda` equals no tensor's device, so nothing would ever move."""
    with pytest.raises(AssertionError, match="cuda equals no tensor's device"):
        ActivationOffload(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams, events and pinned memory")
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_on_a_gpu_asynchronous_offload_gives_the_same_bits_and_takes_less_memory(is_checkpointed: bool) -> None:
    # wide rows and narrow weights: the gradients, which stay on the device, must not hide the savings
    device, tokens, width, depth = torch.device("cuda", 0), 32768, 1024, 16
    generator = torch.Generator(device).manual_seed(0)
    weights = [torch.randn(width, width, device=device, generator=generator) / 32 for _ in range(depth)]
    weights = [torch.nn.Parameter(weight) for weight in weights]  # other leaves would be offloaded
    x = torch.randn(tokens, width, device=device, generator=generator)  # 128 MiB per layer
    offload = ActivationOffload(device)

    def layer(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(states @ weight)

    def run(is_offloaded: bool) -> tuple[list[torch.Tensor], int]:
        """Gradients in host memory, and the peak above the memory allocated before."""
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with offload if is_offloaded else contextlib.nullcontext():
            states = x
            for weight in weights:
                states = (
                    checkpoint(layer, states, weight, use_reentrant=False) if is_checkpointed else layer(states, weight)
                )
            loss = states.square().sum()
        gradients = [gradient.cpu() for gradient in torch.autograd.grad(loss, weights)]
        return gradients, torch.cuda.max_memory_allocated(device) - before

    expected, highest = run(False)
    for _ in range(3):  # buffers are reused while copies of the previous round may still run
        found, peak = run(True)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert peak < highest - depth // 2 * x.nbytes
        held = offload.host_bytes
    assert held == offload.host_bytes <= (2 * depth + 2) * x.nbytes
