"""LoRA on stacked experts as PEFT has it (`target_parameters`), over experts in 4 bits: attach, find, compute.

PEFT wraps the experts once for each adapted weight, the first one innermost, so that keys do not name the weight:

    mlp.experts.base_layer.lora_A.weight    of gate_up_proj (E r, H)
    mlp.experts.lora_A.weight               of down_proj (E r, F); of the only weight, if one is adapted

PEFT's own forward pass adds the product of B and A of all experts to their whole weight in 16 bits. Here the wrappers
hold the adapters alone, and `Experts4bit` computes with them.

Legend: E experts, H hidden, F inner width, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..errors import UserError
from .expert_updates import Update
from .experts import EXPERT_WEIGHTS, Experts4bit, PackedExperts
from .forward import strip_wrappers


def expert_targets(model: nn.Module) -> list[str]:
    """`target_parameters` that select both weights of all experts in 4 bits, in this class and in stock transformers'.

    Raises UserError for a model without such experts.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, Experts4bit)]
    if not names:
        raise UserError(
            "lora.experts is all, but this base has no stacked experts in 4 bits; use shared, and "
            "model.quantization=nf4 or fp4 for a mixture"
        )
    within_layer = {re.sub(r"^.*\.\d+\.", "", name) for name in names}
    return [f"{name}.{weight}" for name in sorted(within_layer) for weight in EXPERT_WEIGHTS]


class _StandIn(nn.Module):
    """What PEFT inspects of experts: weights of their shapes, without memory."""

    def __init__(self, experts: Experts4bit) -> None:
        super().__init__()
        self.real = (experts,)  # not a submodule
        for name in EXPERT_WEIGHTS:
            packed: PackedExperts = getattr(experts, name)
            empty = torch.zeros((), device=packed.codes.device).expand(packed.shape)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))


@contextmanager
def wrappable_experts(model: nn.Module) -> Iterator[None]:
    """Within, PEFT can wrap the experts of a base or load a further adapter; afterwards they compute with adapters."""
    _replace(model, Experts4bit, _StandIn)
    try:
        yield
    finally:
        _replace(model, _StandIn, lambda one: one.real[0])
        for module in model.modules():
            if isinstance(module, ParamWrapper) and isinstance(_innermost(module), Experts4bit):
                module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _replace(model: nn.Module, kind: type, other: Any) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, other(module))


def _innermost(wrapper: Any) -> nn.Module:
    while isinstance(wrapper, ParamWrapper):
        wrapper = wrapper.base_layer
    inner: nn.Module = wrapper
    return inner


def _forward(wrapper: Any, *inputs: Tensor) -> Tensor:
    """The experts with the adapters of all wrappers around them."""
    updates: dict[str, Update] = {}
    layer = wrapper
    while isinstance(layer, ParamWrapper):
        active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
        if len(active) > 1:
            raise UserError(f"adapters {', '.join(active)}: experts are computed with one adapter at a time")
        for name in active:
            a, b = (getattr(layer, factor)[name].weight for factor in ("lora_A", "lora_B"))
            updates[layer.parameter_name] = Update(a, b, layer.scaling[name])
        layer = layer.base_layer
    result: Tensor = layer(*inputs, updates)
    return result


def adapted_experts(model: nn.Module) -> dict[str, Any]:
    """PEFT's wrappers by the name in the base of the weight (E, O, I) that they adapt."""
    return {
        f"{owner_and_depth(strip_wrappers(name))[0].removeprefix('base_model.model.')}.{module.parameter_name}": module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def owner_and_depth(name: str) -> tuple[str, int]:
    """The name of the experts from the name of a wrapper, and how many wrappers are around that one."""
    owner = re.sub(r"(\.base_layer)+$", "", name)
    return owner, (len(name) - len(owner)) // len(".base_layer")


def adapted_weight(name: str, target_parameters: Sequence[str]) -> str | None:
    """The name of the experts' weight that an adapter's `name` belongs to; None: it is that of a linear layer."""
    owner, depth = owner_and_depth(name)
    weights = [one for one in EXPERT_WEIGHTS if any(f".{owner}.{one}".endswith(f".{end}") for end in target_parameters)]
    return f"{owner}.{weights[-1 - depth]}" if depth < len(weights) else None
