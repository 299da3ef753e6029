"""zero3: DeepSpeed shards the base too, and gathers a layer while it runs.

DeepSpeed manages the whole model. Each weight, trained or frozen, is split into equal shards over the ranks; hooks on
each module gather its own weights before it runs and release them after. Uses of another module's weights are detected
in the first forward pass (LoRA layers, whose forward pass here reads A and B) or registered (the head, for the loss).

4-bit bases, as tested with DeepSpeed 0.19.8, transformers 5.23 and bitsandbytes 0.50.2:
- Load: transformers does not partition a quantized model while reading it (it checks `not _is_quantized`), so each rank
  holds the whole 4-bit base before it is sharded. Others are read into host memory, moved and sharded one by one.
- Gather: a shard keeps the type of its weight, here uint8, and is gathered as such: codes are never copied as floats.
  The base is bit-identical after training, and losses are ddp's (tests/test_optim/test_zero.py).
- Not sharded: quantization constants, attributes of the Python object (with double quantization 3 % of the base).
- bitsandbytes' product keeps the gathered codes until its backward pass, so without recomputation the peak would not
  shrink; its int8 layers keep copies of codes and scales outside the parameter. Both are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..cluster.world import World
from . import T
from .flat import ParameterGroups
from .zero import ZeroUpdate, require_deepspeed


class _Root(torch.nn.Module):
    """The root module, whose forward pass is any function of the model: DeepSpeed counts steps by calls of the root."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class Zero3Update(ZeroUpdate):
    """An update by a DeepSpeed engine of stage 3."""

    def __init__(
        self,
        world: World,
        groups: ParameterGroups,
        optimizer: torch.optim.Optimizer,
        ds_config: dict[str, Any],
        model: torch.nn.Module,
        head_weight: torch.Tensor,
    ) -> None:
        self._root = _Root(model)
        world.require_group()
        backend = require_deepspeed().accelerator.get_accelerator().communication_backend_name()
        require_deepspeed().init_distributed(backend)  # uses the existing group
        # weight by weight, here and not in the engine, which would move the whole model to the device first
        require_deepspeed().zero.Init(module=self._root, config_dict_or_path=ds_config)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(world.device)
        super().__init__(world, groups, optimizer, ds_config, self._root)
        require_deepspeed().zero.register_external_parameter(self._root, head_weight)

    def forward(self, function: Callable[[], T]) -> T:
        result: T = self._root(function)
        return result

    def _averaged_norm(self) -> torch.Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norm: torch.Tensor = combine_grad_norm_groups(self._zero._get_norm_groups())
        return norm

    def each_weight(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._groups.each_weight():
            with self._gathered(parameter):
                yield name, parameter

    @contextmanager
    def whole_weights(self, to_write: bool = False) -> Iterator[None]:
        shards = []
        for _, parameter in self._groups.each_weight():
            with self._gathered(parameter):
                is_needed = to_write or self._world.is_main
                whole = parameter.data.to("cpu", copy=True) if is_needed else None
            shards.append((parameter, parameter.data))  # DeepSpeed's, empty while the weight is not gathered
            if whole is not None:
                parameter.data = whole
        written = []
        try:
            yield
            written = [parameter.data for parameter, _ in shards] if to_write else []
        finally:
            for parameter, shard in shards:
                parameter.data = shard
        for (parameter, _), whole in zip(shards, written):
            with self._gathered(parameter, modifier_rank=0):  # rank 0's values are kept on exit
                parameter.data.copy_(whole)

    def _gathered(self, parameter: torch.nn.Parameter, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        gathered: AbstractContextManager[Any] = require_deepspeed().zero.GatheredParameters(
            [parameter], modifier_rank=modifier_rank
        )
        return gathered

    # --- states -------------------------------------------------------------------------------------------------------

    @property
    def _partitions(self) -> list[torch.nn.Parameter]:
        partitions: list[torch.nn.Parameter] = self._zero.fp32_partitioned_groups_flat
        assert len(partitions) == len(self._groups.groups), "sub_group_size was checked before"
        return partitions

    def _refresh_masters(self) -> None:
        for master, weights in zip(self._partitions, self._zero.fp16_partitioned_groups_flat):
            master.data.copy_(weights.data)

    @contextmanager
    def _attached(self) -> Iterator[torch.optim.Optimizer]:
        optimizer: torch.optim.Optimizer = self._zero.optimizer
        for group, partition in zip(optimizer.param_groups, self._partitions, strict=True):
            group["params"] = [partition]  # as DeepSpeed does during a step
        yield optimizer
        for group in optimizer.param_groups:
            group["params"] = []

    def _shards(self, index: int) -> Iterator[tuple[int, int, int, int]]:
        """For each weight: start in the layout, elements, start in a rank's partition, elements of a rank's shard."""
        group = self._groups.groups[index]
        their_start = {}
        at = 0
        for parameter in self._zero.fp16_groups[index]:
            their_start[id(parameter)] = at
            at += parameter.partition_numel()
        for placement, parameter in zip(group.placements, group.parameters.values(), strict=True):
            yield (
                placement.start,
                torch.Size(placement.shape).numel(),
                their_start[id(parameter)],
                parameter.partition_numel(),  # type: ignore[attr-defined]
            )

    def _to_layout(self, index: int, parts: list[torch.Tensor]) -> torch.Tensor:
        result = torch.zeros(self._groups.groups[index].size, dtype=parts[0].dtype)
        for start, size, their_start, shard in self._shards(index):
            whole = torch.cat([one[their_start : their_start + shard] for one in parts])
            result[start : start + size] = whole[:size]
        return result

    def _from_layout(self, index: int, value: torch.Tensor) -> torch.Tensor:
        own = torch.zeros(self._partitions[index].numel(), dtype=value.dtype)
        for start, size, their_start, shard in self._shards(index):
            first = min(size, shard * self._world.rank)
            last = min(size, shard * (self._world.rank + 1))
            own[their_start : their_start + last - first] = value[start + first : start + last]
        return own
