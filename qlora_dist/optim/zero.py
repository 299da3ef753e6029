"""zero1, zero2, zero2_offload: DeepSpeed shards the optimizer states, and in zero2 the gradients, of trained weights.

DeepSpeed is given a module that holds the trained weights and nothing else. Its engine may cast, move, broadcast and
flatten what it is given; the frozen base, whose 4-bit codes and bf16 norms must not change by a single bit, is out of
its reach. The model runs as under ddp; DeepSpeed receives gradients through its hooks on the weights.

The engine is created by `deepspeed.initialize` on the process group that Accelerate has created, not by
`Accelerator.prepare`: that wrapper steps inside `backward`, which leaves no point between reduction and update to
detect a non-finite value, and its plugin would make transformers load the model by its own rules.

Scale. DeepSpeed averages over ranks, and divides by a loss scale just before the update, on the fp32 partition. The
scale is set to labels / ranks for the update, so gradients are the sum over ranks / labels, as under ddp; a scaled loss
would have been rounded to the activations' type. Accumulation does not divide (`scale_wrt_gas=False`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..cluster.world import World
from ..errors import UserError
from . import States, T
from .adamw import load_optimizer_state, optimizer_state, quiet_paging
from .flat import ALIGNMENT, ParameterGroup, ParameterGroups, digest_of


class _Trained(torch.nn.Module):
    """The trained weights as a module; its forward pass is any function that computes a loss with them."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(parameters)

    def forward(self, loss_sum: Callable[[], torch.Tensor]) -> torch.Tensor:
        return loss_sum()


class ZeroUpdate:
    """An update by a DeepSpeed engine of stage 1 or 2."""

    def __init__(
        self,
        world: World,
        groups: ParameterGroups,
        optimizer: torch.optim.Optimizer,
        ds_config: dict[str, Any],  # filled, see fill_ds_config
        module: torch.nn.Module | None = None,  # given to DeepSpeed; None: the trained weights
    ) -> None:
        self._world = world
        self._groups = groups
        self._parameters = [parameter for group in groups.groups for parameter in group.parameters.values()]
        self._own_norms: list[torch.Tensor] = []
        for parameter in self._parameters:  # before DeepSpeed's hook, which sums the gradient over ranks and drops it
            parameter.register_post_accumulate_grad_hook(self._record_gradient)
        world.require_group()
        self._engine = _initialize(module or _Trained(self._parameters), optimizer, ds_config)
        self._zero = self._engine.optimizer
        if "8bit" in type(optimizer).__name__:
            self._require_whole_blocks(type(optimizer).__name__)

    def _record_gradient(self, parameter: torch.nn.Parameter) -> None:
        assert parameter.grad is not None
        # one kernel and no sync; inspected after a failure
        self._own_norms.append(torch.linalg.vector_norm(parameter.grad))

    def zero_grad(self) -> None:
        self._own_norms = []
        self._zero.zero_grad()

    def forward(self, function: Callable[[], T]) -> T:
        return function()

    def forward_backward(self, loss_sum: Callable[[], torch.Tensor], is_last: bool) -> torch.Tensor:
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss = self._engine(loss_sum)
        self._engine.backward(loss, scale_wrt_gas=False)
        return loss.detach()

    def _averaged_norm(self) -> torch.Tensor:
        norm: torch.Tensor = self._zero.scaled_global_norm()
        return norm

    def grad_norm(self) -> torch.Tensor:
        norm = self._averaged_norm() * self._world.size
        # DeepSpeed reports a non-finite norm as -1
        return torch.where(norm >= 0, norm, torch.nan).to(self._world.device)

    def own_gradients_are_finite(self) -> bool:
        return bool(torch.stack(self._own_norms).isfinite().all())

    def clip_and_step(self, lr: float, num_labels: int, grad_norm: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._zero.override_loss_scale(num_labels / self._world.size)
        with quiet_paging():
            self._engine.step()  # clips by the file's gradient_clipping, which is optim.max_grad_norm
        self._zero.custom_loss_scaler = False  # or the next backward pass would scale the loss
        assert not self._zero.overflow, "a non-finite norm stops the run before this"

    def each_weight(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._groups.each_weight()

    def whole_weights(self, to_write: bool = False) -> AbstractContextManager[object]:
        return nullcontext()

    def layout(self) -> list[list[list[object]]]:
        return self._groups.layout()

    def digest(self) -> str:
        return digest_of(self.each_weight())

    # --- states: partitions of DeepSpeed's flat groups <-> one flat tensor per group ----------------------------------

    def state(self) -> States:
        with self._attached() as optimizer:
            partitions, numbers = optimizer_state(optimizer)
        tensors = {}
        for name, own in partitions.items():
            index, kind = self._group_and_kind(name, own)
            if kind == "replicated":
                tensors[name] = own
            elif (parts := self._world.gather_tensor(own)) is not None:
                tensors[name] = self._to_layout(index, parts) if kind == "elements" else torch.cat(parts)
        return (tensors, numbers) if self._world.is_main else ({}, {})

    def load_state(self, tensors: dict[str, torch.Tensor], numbers: dict[str, float]) -> None:
        self._refresh_masters()
        with self._attached() as optimizer:
            had_grad = [partition.grad is not None for partition in self._partitions]  # offload keeps them
            for partition in self._partitions:
                partition.grad = torch.zeros_like(partition)
            own = {name: self._own_part(name, value) for name, value in tensors.items()}
            load_optimizer_state(optimizer, own, numbers)
            for partition, keeps in zip(self._partitions, had_grad):
                if not keeps:
                    partition.grad = None

    def _refresh_masters(self) -> None:
        self._zero.refresh_fp32_params()  # its masters are copies: update them from the loaded weights

    @contextmanager
    def _attached(self) -> Iterator[torch.optim.Optimizer]:
        """The inner optimizer, whose groups hold this rank's partitions."""
        yield self._zero.optimizer

    @property
    def _partitions(self) -> list[torch.nn.Parameter]:
        """This rank's fp32 shard of each group: what the optimizer updates."""
        partitions: list[torch.nn.Parameter] = self._zero.single_partition_of_fp32_groups
        return partitions

    def _group_and_kind(self, name: str, value: torch.Tensor) -> tuple[int, str]:
        """Group of a state, and whether it has an entry for each element, for each block of elements, or neither."""
        index, _, key = name.partition(".")
        if value.ndim == 0 or key.startswith("qmap"):  # step count, code book
            return int(index), "replicated"
        return int(index), "blocks" if key.startswith("absmax") else "elements"

    def _starts(self, index: int) -> dict[str, tuple[int, int, int]]:
        """Name -> start in the layout, start in DeepSpeed's flat group, number of elements."""
        group: ParameterGroup = self._groups.groups[index]
        theirs = {
            id(parameter): offset
            for parameter, offset in zip(
                self._zero.round_robin_bit16_groups[index], self._zero.round_robin_bit16_offsets[index], strict=True
            )
        }
        return {
            placement.name: (placement.start, theirs[id(parameter)], parameter.numel())
            for placement, parameter in zip(group.placements, group.parameters.values(), strict=True)
        }

    def _to_layout(self, index: int, parts: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat(parts)
        result = torch.zeros(self._groups.groups[index].size, dtype=whole.dtype)
        for start, their_start, size in self._starts(index).values():
            result[start : start + size] = whole[their_start : their_start + size]
        return result

    def _own_part(self, name: str, value: torch.Tensor) -> torch.Tensor:
        index, kind = self._group_and_kind(name, value)
        if kind == "replicated" or index >= len(self._partitions):
            return value
        size = self._partitions[index].numel()
        if kind == "elements":
            return self._from_layout(index, value)
        size //= ALIGNMENT
        return value[size * self._world.rank : size * (self._world.rank + 1)]

    def _from_layout(self, index: int, value: torch.Tensor) -> torch.Tensor:
        size = self._partitions[index].numel()
        whole = torch.zeros(size * self._world.size, dtype=value.dtype)
        for start, their_start, count in self._starts(index).values():
            whole[their_start : their_start + count] = value[start : start + count]
        return whole[size * self._world.rank : size * (self._world.rank + 1)]

    def _require_whole_blocks(self, name: str) -> None:
        """8-bit states have one scale per block of 256 elements: blocks must not span two weights or two ranks.

        Otherwise a checkpoint could not be resumed under another strategy or number of ranks.
        """
        for index, partition in enumerate(self._partitions):
            odd = [weight for weight, (mine, theirs, _) in self._starts(index).items() if mine != theirs]
            if odd or partition.numel() % ALIGNMENT:
                what = f"weight {odd[0]} starts" if odd else f"a rank's shard ({partition.numel():,} elements) ends"
                raise UserError(
                    f"{name}: its 8-bit states have one scale per {ALIGNMENT} elements, and {what} within such a block "
                    "in DeepSpeed's flat storage: a checkpoint would be valid for this strategy and number of ranks "
                    "only; set optim.name=paged_adamw_32bit, or strategy.name=ddp"
                )


def require_deepspeed() -> Any:
    """The deepspeed module, imported without its log messages. Raises UserError if it cannot be imported."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError as error:
        raise UserError(
            f"strategy.name zero* needs DeepSpeed, which cannot be imported ({error}); install it "
            "with DS_BUILD_OPS=0 pip install 'qlora-dist[deepspeed]', or set strategy.name=ddp"
        ) from None
    finally:
        logging.disable(previous)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch 2.13 renames collectives; delete when DeepSpeed uses the new names
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    # on a CPU, wrapping the process group would compile shared-memory collectives: that takes minutes and a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _initialize(module: torch.nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> Any:
    deepspeed = require_deepspeed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
    return engine
