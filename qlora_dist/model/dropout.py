"""Dropout on the input of A as a pure function of (row, layer, token, channel).

A micro-batch is a matter of memory, a rank a matter of the cluster: neither may decide what is dropped. Each row of a
training step has a seed of its own, from which every layer derives the mask of that row's tokens. So a run drops the
same activations with other micro-batches, on other ranks, after a resume, and when a layer is recomputed in the
backward pass, for which no random state needs to be kept.

Legend: T tokens, I inputs of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LAYER_STEP = 0x9E3779B97F4A7C15  # odd, so that the layers' seeds differ; 2^64 / golden ratio
_SEEDS = 2**63


@dataclass
class DropoutRows:
    """The rows of the micro-batch being computed: (tokens, seed) of each. One object for all layers of a model."""

    rows: tuple[tuple[int, int], ...] = ()


class RowDropout(nn.Module):
    """Dropout whose mask is derived from the seeds of the rows; otherwise as `nn.Dropout`."""

    def __init__(self, p: float, layer: int, current: DropoutRows) -> None:
        super().__init__()
        self.p, self.layer, self.current = p, layer, current

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., I)."""
        if not self.training:
            return x
        if not self.current.rows:
            raise RuntimeError(
                "dropout in training derives its masks from the batch's rows: set `DropoutRows.rows` first"
            )
        dropped: Tensor = _Masked.apply(x, self._keeps(x), 1 / (1 - self.p))
        return dropped

    def _keeps(self, x: Tensor) -> Tensor:
        """(..., I) bool: what is kept."""
        keeps = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        by_token = keeps.view(-1, x.shape[-1])
        rows = self.current.rows
        if sum(tokens for tokens, _ in rows) != len(by_token):  # an expert, which sees some of the tokens
            rows = ((len(by_token), rows[0][1]),)
        generator, start = torch.Generator(x.device), 0
        for tokens, seed in rows:
            generator.manual_seed((seed + self.layer * _LAYER_STEP) % _SEEDS)
            by_token[start : start + tokens].bernoulli_(1 - self.p, generator=generator)
            start += tokens
        return keeps


def _times_mask(x: Tensor, keeps: Tensor, scale: float) -> Tensor:
    result: Tensor = torch.ops.aten.native_dropout_backward(x, keeps, scale)
    return result


class _Masked(torch.autograd.Function):
    """x * keeps * scale in one kernel; saves the mask alone, one byte per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keeps: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keeps)
        ctx.scale = scale
        return _times_mask(x, keeps, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keeps,) = ctx.saved_tensors
        return _times_mask(grads[0], keeps, ctx.scale), None, None


def use_row_dropout(layers: dict[str, Any]) -> None:
    """Replaces the dropout of all adapted layers of a model (PEFT's `LoraLayer`, in the order of the model)."""
    current = DropoutRows()
    for index, layer in enumerate(layers.values()):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = RowDropout(dropout.p, index, current)


def dropout_rows(model: nn.Module) -> DropoutRows:
    """What a training step sets before each micro-batch; without dropout nothing reads it."""
    return next((one.current for one in model.modules() if isinstance(one, RowDropout)), DropoutRows())
