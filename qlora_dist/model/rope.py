"""Rotary frequencies that depend on the length of the text (longrope, dynamic NTK), chosen for each packed document.

transformers chooses them from the largest position of a call, which in a packed row is that of the longest document,
and dynamic NTK keeps its choice for later calls. Here such a module is called once for each document, from the state
that it was built with, so a document has the frequencies that it has alone. Other rope types are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def scale_by_document(model: nn.Module, base: nn.Module) -> None:
    """Makes every rotary module of `model` that depends on length follow the documents that `base` is called with.

    `base` receives the keyword `packed` (see `attention.PackedDocuments`), whose lengths are known on the host.
    """
    modules = _length_dependent(model)
    if not modules:
        return
    current: list[tuple[int, ...]] = [()]  # lengths of the documents of the latest call, also while it is recomputed

    def remember(_module: nn.Module, _args: Any, keywords: dict[str, Any]) -> None:
        current[0] = keywords["packed"].lengths

    base.register_forward_pre_hook(remember, with_kwargs=True)
    for module in modules:
        module.forward = partial(_by_document, module, module.forward, current)


def _length_dependent(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if any(_depends_on_length(one) for one in _rope_types(module))]


def _rope_types(module: nn.Module) -> list[str]:
    found = getattr(module, "rope_type", None)  # one for each kind of layer where they differ
    return [str(one) for one in (found.values() if isinstance(found, dict) else [found])]


def _depends_on_length(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _by_document(
    module: Any,
    forward: Any,
    current: list[tuple[int, ...]],
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """cos and sin (1, T, D) of a row, one document after another. `x` only gives type and device."""
    (lengths,) = current
    assert sum(lengths) == position_ids.shape[-1], f"{lengths} of {position_ids.shape[-1]} positions"
    parts = []
    for positions in position_ids.split(list(lengths), dim=-1):
        _reset(module)
        parts.append(forward(x, positions, *args, **kwargs))
    _reset(module)
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(one, dim=-2) for one in zip(*parts, strict=True))
    return torch.cat(parts, dim=-2)


def _reset(module: Any) -> None:
    """The state that the module was built with, under the names that transformers gives it."""
    for name, original in [*module.named_buffers(recurse=False), *vars(module).items()]:
        if name.endswith("original_inv_freq") and isinstance(original, Tensor):
            frequencies = name.replace("original_", "")
            module.register_buffer(frequencies, original.to(getattr(module, frequencies).device, copy=True), False)
        elif name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)


@contextmanager
def scaled_beyond(model: nn.Module, num_tokens: int) -> Iterator[None]:
    """Inside, lengths count as long from `num_tokens` on, so that a few tokens show what thousands would.

    For comparisons of a packed row with its documents; does nothing for other rope types.
    """
    kept: list[tuple[Any, str, Any]] = []

    def lower(owner: Any, name: str) -> None:
        values = owner if isinstance(owner, dict) else vars(owner)
        if isinstance(values.get(name), int):
            kept.append((values, name, values[name]))
            values[name] = num_tokens

    for module in _length_dependent(model):
        lower(module, "original_max_seq_len")
        lower(module, "max_seq_len_cached")
        lower(module.config, "max_position_embeddings")
        lower(module.config, "original_max_position_embeddings")
        parameters = module.config.rope_parameters
        for one in [parameters, *(part for part in parameters.values() if isinstance(part, dict))]:
            lower(one, "original_max_position_embeddings")
    try:
        yield
    finally:
        for values, name, value in reversed(kept):
            values[name] = value
