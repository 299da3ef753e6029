"""Held-out loss and perplexity, by the same loss code as training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..cluster.stop_signal import StopRequested
from ..data.packing import Batch
from ..model import evaluation_mode


class Summer(Protocol):
    """What evaluation needs of `cluster.world.World`."""

    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor: ...

    def any(self, flag: bool) -> bool: ...


@dataclass(frozen=True)
class EvalResult:
    """Held-out figures over all ranks."""

    loss: float  # mean NLL of a label
    perplexity: float
    num_labels: int
    seconds: float


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    nll_sum: Callable[[Batch], torch.Tensor],
    world: Summer,
    stop_requested: Callable[[], bool] | None = None,
) -> EvalResult:
    """Mean NLL over the labels of all ranks' batches. Every rank calls it; ranks without labels bring filler.

    `nll_sum` gives the () sum of one batch's label NLL. Raises StopRequested on all ranks when one was asked to stop:
    a part of the held-out data is no figure.
    """
    started = time.perf_counter()
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    with evaluation_mode(model):
        for batch in batches:
            # agreed on before each batch: its forward pass may hold collectives (FSDP2)
            if stop_requested is not None and world.any(stop_requested()):
                raise StopRequested
            totals[0] += nll_sum(batch.to(world.device)).double()
            totals[1] += batch.num_labels
    nll, num_labels = world.sum(totals).tolist()
    loss = nll / max(num_labels, 1)
    perplexity = math.exp(min(loss, 700.0))  # exp overflows above
    return EvalResult(loss, perplexity, int(num_labels), time.perf_counter() - started)
