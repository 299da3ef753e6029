"""ddp: every rank holds all trained weights in one flat storage, with all gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from ..cluster.world import World
from . import States, T
from .adamw import load_optimizer_state, optimizer_state, step_optimizer
from .flat import FlatParameters, digest_of
from .reducer import GradientReducer


class ReplicatedUpdate:
    """Gradients are summed over ranks in fixed buckets (`GradientReducer`), then every rank updates all weights."""

    def __init__(
        self,
        world: World,
        flat: FlatParameters,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
    ) -> None:
        self._world = world
        self._flat = flat
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self.reducer = GradientReducer(world.size, flat.grads, [group.spans() for group in flat.groups])

    def zero_grad(self) -> None:
        self._flat.zero_grad()

    def forward(self, function: Callable[[], T]) -> T:
        return function()

    def forward_backward(self, loss_sum: Callable[[], torch.Tensor], is_last: bool) -> torch.Tensor:
        self._world.restart_limit()  # a step may have many micro-steps: each gets the step's limit
        if is_last:
            self.reducer.arm()
        loss = loss_sum()
        # Gradients are divided by the global step's number of labels once, in fp32, after the sum: a scaled seed of the
        # backward pass would be rounded to the activations' type (up to 0.4 % in bf16, equally for every gradient)
        loss.backward()
        if is_last:
            with self._world.waiting():
                self.reducer.finish()
        return loss.detach()

    def grad_norm(self) -> torch.Tensor:
        return self._flat.grad_norm()

    def own_gradients_are_finite(self) -> bool:
        return bool(self.reducer.own_are_finite)

    def clip_and_step(self, lr: float, num_labels: int, grad_norm: float) -> None:
        clip = 1.0 if self._max_grad_norm is None else min(1.0, self._max_grad_norm / (grad_norm + 1e-6))
        self._flat.scale_grads(clip / num_labels)
        step_optimizer(self._optimizer, lr)

    def each_weight(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._flat.each_weight()

    def whole_weights(self, to_write: bool = False) -> AbstractContextManager[object]:
        return nullcontext()

    def layout(self) -> list[list[list[object]]]:
        return self._flat.layout()

    def digest(self) -> str:
        return digest_of(self.each_weight())

    def state(self) -> States:
        return optimizer_state(self._optimizer) if self._world.is_main else ({}, {})

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, float]) -> None:
        load_optimizer_state(self._optimizer, tensors, numbers)
