"""Weights that stay in fp32 beside 16-bit ones, by the word of their class in transformers: a router's corrections, a
router. `from_pretrained` keeps them so; rounded, they choose other experts."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives the type fp32 to what the model's class keeps so beside `dtype`."""
    for tensors, attribute, value in _kept(model, dtype):
        _put(tensors, attribute, value.float())


def float32_names(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """Names of the parameters and buffers that the model's class keeps in fp32 beside `dtype`."""
    kept = {(id(tensors), attribute) for tensors, attribute, _ in _kept(model, dtype)}
    return frozenset(
        f"{prefix}.{attribute}".removeprefix(".")
        for prefix, module in model.named_modules()
        for tensors in (module._parameters, module._buffers)
        for attribute in tensors
        if (id(tensors), attribute) in kept
    )


def _put(tensors: dict[str, Any], attribute: str, value: Tensor) -> None:
    is_weight = isinstance(tensors[attribute], nn.Parameter)
    tensors[attribute] = nn.Parameter(value, requires_grad=False) if is_weight else value


def _kept(model: PreTrainedModel, dtype: torch.dtype) -> list[tuple[dict[str, Any], str, Tensor]]:
    """(parameters or buffers of a module, name among them, value)."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return []
    names = re.compile("|".join(key.replace("*", ".*") for key in plan))  # found anywhere in a name, as there
    return [
        (tensors, attribute, value)
        for prefix, module in model.named_modules()
        for tensors in (module._parameters, module._buffers)
        for attribute, value in tensors.items()
        if value is not None and value.is_floating_point() and names.search(f"{prefix}.{attribute}")
    ]
