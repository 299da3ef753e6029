"""On the device of a run: does a decoder layer computed as a block give what transformers' own layer gives?

A kernel that is right in every test may still be wrong with this compiler, on this driver, at this model's shapes, and
training would go on with other gradients. So each run compares both, forward and backward, before its first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunFailed
from . import forward
from .forward import decoder_layers, evaluation_mode, hidden_states, packed_documents, strip_wrappers, unwrap

# two documents; no multiple of any kernel's block of rows
LENGTHS = (41, 26)
# Like an embedding's, so that the layer's own branches and not the residual stream decide what is compared
INPUT_SCALE = 0.02
# Of the largest value. In bf16 both round about ten times on the way: up to 0.06 was seen over families and shapes, and
# 4e-6 in fp32. A kernel that leaves out a row or takes another sign is off by 0.3 and more.
TOLERANCE = 0.15


def check_blocks(model: nn.Module) -> None:
    """Compares the first block of each kind with the plain layer that it replaces: output, gradient of its input, and
    gradients of its adapters, on random activations.

    Raises RunFailed when any differs by more than TOLERANCE.
    B is random meanwhile where it is whole on this rank, since zeros would hide the adapters' part. A model without
    blocks passes. To be called by all ranks: layers of a sharded base are gathered.
    """
    layers = decoder_layers(model)
    kinds = {(type(one), getattr(one.self_attn, "use_rope", True)): one for one in reversed(layers)
             if hasattr(one, "plain_class")}  # fmt: skip
    for layer in kinds.values():
        with evaluation_mode(model):
            arguments, keywords = _call_of(model, layer)
            with _random_b(layer):
                found = _outcome(layer, arguments, keywords)
                block_class, layer.__class__ = type(layer), type(layer).plain_class
                try:
                    expected = _outcome(layer, arguments, keywords)
                finally:
                    layer.__class__ = block_class
        for name, value in expected.items():
            if forward.differ(found[name], value, TOLERANCE):
                error = (found[name] - value).abs().max() / value.abs().max()
                raise RunFailed(
                    f"the kernels of a decoder layer give wrong results on this device: {name} of a "
                    f"{layer.plain_class.__name__} differs from transformers' own layer by {error:.2g} of its largest "
                    f"value, expected at most {TOLERANCE}. Nothing was trained; set model.kernels=reference, "
                    "which uses none of them and gives the same losses, or try another version of Triton and driver"
                )


def _call_of(model: nn.Module, layer: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a packed batch calls the layer: its arguments after the hidden states."""
    base = unwrap(model)
    device = forward.computing_device(base)
    tokens = torch.arange(sum(LENGTHS), device=device) % base.config.get_text_config().vocab_size
    calls: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    try:
        with torch.no_grad():
            hidden_states(model, packed_documents(tokens, LENGTHS))
    finally:
        handle.remove()
    (given, keywords) = calls[0]
    first = given[0] if given else keywords["hidden_states"]
    generator = torch.Generator(device).manual_seed(0)
    x = INPUT_SCALE * torch.randn(first.shape, generator=generator, device=device, dtype=torch.float32)
    rest = {key: value for key, value in keywords.items() if key != "hidden_states"}
    return (x.to(first.dtype), *given[1:]), rest


@contextmanager
def _random_b(layer: Any) -> Iterator[None]:
    """Inside, the layer's B are of a size that makes an update about as large as the frozen product's result.

    For weights of standard deviation 0.02 and a normed input of I values that result is 0.02 sqrt(I), and A x, for A as
    PEFT draws it, 0.6.
    """
    whole = [(one, key, each.weight) for one in layer.modules() if hasattr(one, "lora_B")
             for key, each in one.lora_B.items() if each.weight.numel()]  # fmt: skip
    saved = [b.detach().clone() for _, _, b in whole]
    with torch.no_grad():
        for one, key, b in whole:
            generator = torch.Generator(b.device).manual_seed(1)
            size = 0.02 * (one.in_features / b.shape[1]) ** 0.5 / one.scaling[key]
            b.copy_(size * torch.randn(b.shape, generator=generator, device=b.device))
        try:
            yield
        finally:
            for (_, _, b), before in zip(whole, saved, strict=True):
                b.copy_(before)


@torch.enable_grad()
def _outcome(layer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Tensor]:
    """What is compared, by name, in fp32. No gradient is accumulated: they are returned, and no hook of a reducer
    runs."""
    x = arguments[0].clone().requires_grad_()
    adapters = {strip_wrappers(name): one for name, one in layer.named_parameters() if one.requires_grad}
    out = layer(x, *arguments[1:], **keywords)
    generator = torch.Generator(x.device).manual_seed(2)
    grad = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(out.dtype)
    gradients = torch.autograd.grad(out, [x, *adapters.values()], grad)
    values = {"the output": out, "the gradient of the input": gradients[0]}
    values |= {f"the gradient of {name}": one for name, one in zip(adapters, gradients[1:], strict=True)}
    return {name: value.detach().float() for name, value in values.items()}
