"""Turns gradients into an update of the trained weights: one interface, with or without DeepSpeed.

    replicated.ReplicatedUpdate   every rank holds all trained weights, gradients and optimizer states (ddp)
    zero.ZeroUpdate               a rank holds a shard of them, by DeepSpeed (zero1, zero2, zero2_offload)
    zero3.Zero3Update             the same, and a shard of the base

The trainer chooses once, when it builds the model; a training step never checks the strategy's name. The update is the
same: gradients of the sum of label NLL are summed over micro-steps and ranks in fp32, divided once by the number of
labels of the global step, clipped by their global norm, and passed to AdamW with fp32 weights. States are saved and
loaded in one layout (`ParameterGroups.layout`), so a run can resume under another strategy and number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

States = tuple[dict[str, torch.Tensor], dict[str, float]]  # host tensors and plain numbers, named `group.key`


class Update(Protocol):
    """All methods are called by all ranks together."""

    def zero_grad(self) -> None:
        """Before the first micro-step."""

    def forward(self, function: Callable[[], T]) -> T:
        """Runs code that needs the model's layers: forward passes, with or without gradients."""

    def forward_backward(self, loss_sum: Callable[[], torch.Tensor], is_last: bool) -> torch.Tensor:
        """Runs one micro-step and adds the gradients of its loss sum, which it returns, detached.

        After the last micro-step gradients are summed over ranks.
        """

    def grad_norm(self) -> torch.Tensor:
        """() fp32: global L2 norm of the summed gradients, not yet divided by labels; equal on all ranks."""

    def own_gradients_are_finite(self) -> bool:
        """Whether this rank's part of the last sum was finite; to find the culprit after a failure."""

    def clip_and_step(self, lr: float, num_labels: int, grad_norm: float) -> None:
        """One update by gradients / num_labels, clipped; `grad_norm` is their norm after that division."""

    def each_weight(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every trained weight with its name, one after another: whole until the next is asked for, to be read only."""

    def whole_weights(self, to_write: bool = False) -> AbstractContextManager[object]:
        """Inside, trained weights are whole: on rank 0, to read them; or on every rank, to write the same values.

        Where a strategy shards them they are then in host memory: one GPU may be too small for all of them.
        """

    def layout(self) -> list[list[list[object]]]:
        """Plain data that must be equal in two runs to exchange states: name, start, shape of each weight, by group."""

    def digest(self) -> str:
        """SHA-256 of all trained weights, equal on all ranks."""

    def state(self) -> States:
        """Whole optimizer states, on rank 0; nothing on the others."""

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, float]) -> None:
        """Restores whole states, after the weights. Raises ValueError if they are not this optimizer's."""
