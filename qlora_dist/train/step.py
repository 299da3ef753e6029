"""One optimizer update."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..cluster.world import World
from ..data.loader import StepRows
from ..data.packing import Batch
from ..errors import RunFailed
from ..model import gathered_head, hidden_states, take_slots
from ..model.dropout import DropoutRows
from ..model.loss import OutputHead, nll_sum
from ..optim import Update


@dataclass
class TrainingModel:
    """The model, its output head and its optimizer, on this rank."""

    module: torch.nn.Module
    head: OutputHead
    update: Update
    compute_dtype: torch.dtype
    # around every forward pass: autocast, activation offload, or nothing
    forward_context: Callable[[], AbstractContextManager[object]]
    num_base_parameters: int
    num_trainable_parameters: int
    dropout: DropoutRows
    base_checksum: str | None = None  # of this rank's base when it was loaded; None: the base itself is trained
    build_peak_bytes: int = 0  # peak memory while all this was built, on this rank

    def nll_sum(self, batch: Batch) -> torch.Tensor:
        """() sum of the batch's label NLL."""
        with self.forward_context():
            hidden = hidden_states(self.module, batch)
            return nll_sum(hidden.to(self.compute_dtype), gathered_head(self.head), batch.label_positions, batch.labels)

    def logits(self, batch: Batch) -> torch.Tensor:
        """(T, V) fp32."""
        with self.forward_context():
            hidden = hidden_states(self.module, batch)
            return gathered_head(self.head).logits(hidden.to(self.compute_dtype))


@dataclass(frozen=True)
class StepStats:
    """One optimizer update, equal on all ranks."""

    loss: float  # mean NLL of the step's labels
    grad_norm: float  # before clipping
    num_labels: int
    num_tokens: int
    stop_requested: bool  # on any rank
    expert_slots: dict[str, list[int]] = field(default_factory=dict)  # of each stacked expert, by the experts' name


def train_step(
    world: World,
    model: TrainingModel,
    rows: StepRows,
    *,
    step: int,  # 0-based
    seed: int,
    lr: float,
    stop_requested: bool,
) -> StepStats:
    """One update. Loss = (sum of label NLL) / (number of labels), both over the whole global step.

    A mean of micro-batch means would weight tokens unequally and depend on the number of ranks. Raises RunFailed on all
    ranks, before the update, when a loss or gradient of any rank is not finite.
    """
    update = model.update
    update.zero_grad()
    take_slots(model.module)  # of batches that were tried

    # forward and backward of each micro-batch; gradients are summed over ranks after the last
    losses: list[torch.Tensor] = []
    for index, batch in enumerate(rows.microbatches):
        model.dropout.rows = _dropout_rows(batch, seed, step)
        is_last = index == len(rows.microbatches) - 1
        nll = update.forward_backward(partial(model.nll_sum, batch.to(world.device)), is_last)
        losses.append(nll.double())

    # sums over ranks: loss, stop requests, labels, experts' slots
    nll = torch.stack(losses).sum()
    own_labels = sum(batch.num_labels for batch in rows.microbatches)
    # filled on the device: numbers copied from the host would be a second host sync
    own = torch.stack([nll, nll.new_full((), stop_requested), nll.new_full((), own_labels)])
    slots = take_slots(model.module)
    total = world.sum(torch.cat([own, _copied(slots, own)]) if slots else own)
    num_labels = max(rows.num_labels, 1)
    # the only host sync of a step; the sums are equal on all ranks, so all decide alike
    with world.waiting():
        grad_norm, nll_total, stops, trained, *of_experts = torch.cat(
            [update.grad_norm().double()[None], total]
        ).tolist()
    grad_norm /= num_labels
    if trained != rows.num_labels or not trained:
        raise RunFailed(
            f"step {step + 1}: {trained:.0f} labels were computed over all ranks, its rows have {rows.num_labels:,}: "
            "rows were lost, duplicated or have no label. Stopped before the update; earlier checkpoints are intact"
        )
    if not (math.isfinite(nll_total) and math.isfinite(grad_norm)):
        raise RunFailed(_explain_non_finite(world, update, rows, losses, step, nll_total / num_labels, grad_norm))

    # clip and step
    update.clip_and_step(lr, num_labels, grad_norm)
    found = iter(of_experts)
    expert_slots = {name: [int(next(found)) for _ in own] for name, own in slots.items()}
    return StepStats(nll_total / num_labels, grad_norm, rows.num_labels, rows.num_tokens, stops > 0, expert_slots)


def _copied(slots: dict[str, list[int]], like: torch.Tensor) -> torch.Tensor:
    """All numbers in a row, on the device of `like` without waiting for it."""
    numbers = torch.tensor([number for own in slots.values() for number in own], dtype=like.dtype)
    return numbers.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else numbers


def try_batch(world: World, model: TrainingModel, batch: Batch, later_bytes: int) -> None:
    """Forward and backward of one micro-batch, down to the first trained weight. Leaves no gradient and no state.

    All ranks call it together. `later_bytes` of device memory are reserved meanwhile: what the first update will add
    (optimizer states). Raises torch.OutOfMemoryError when it does not fit.
    """
    first = next(parameter for parameter in model.module.parameters() if parameter.requires_grad)
    model.dropout.rows = _dropout_rows(batch, 0, 0)
    held = torch.empty(later_bytes if world.device.type == "cuda" else 0, dtype=torch.uint8, device=world.device)
    # not `backward`: no weight's gradient is written, so no strategy's hook sees this pass
    model.update.forward(lambda: torch.autograd.grad(model.nll_sum(batch.to(world.device)), first))
    del held


def _dropout_rows(batch: Batch, seed: int, step: int) -> tuple[tuple[int, int], ...]:
    """(tokens, seed of its dropout) of each row: the same on every rank, in every micro-batch and after a resume."""
    return tuple(
        (tokens, int(np.random.SeedSequence((seed, step, row)).generate_state(1, np.uint64)[0] >> 1))
        for tokens, row in zip(batch.row_tokens, batch.row_indices, strict=True)
    )


def _explain_non_finite(
    world: World, update: Update, rows: StepRows, losses: list[torch.Tensor], step: int, loss: float, grad_norm: float
) -> str:
    """Names on all ranks the rank whose rows gave the bad value. Called by all ranks together."""
    bad = [row for batch, value in zip(rows.microbatches, losses) if not value.isfinite() for row in batch.row_indices]
    if bad:
        own = f"loss of rows {bad}"
    elif not update.own_gradients_are_finite():
        own = f"gradient of rows {[row for batch in rows.microbatches for row in batch.row_indices]}"
    else:
        own = None
    found = [
        f"rank {rank} ({host}): {what}"
        for rank, (host, what) in enumerate(world.gather((socket.gethostname(), own)))
        if what is not None
    ]
    where = "; ".join(found) if found else f"the sum over ranks, of rows {list(rows.row_indices)}"
    return (
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: not finite in {where}. All ranks stopped before the "
        "update; earlier checkpoints are intact. Inspect these rows (qlora-dist data CONFIG), lower optim.lr, or "
        "resume from an earlier checkpoint"
    )
