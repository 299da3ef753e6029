"""The ranks over which one base is sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ShardGroup:
    """The ranks over which one base is sharded. Its collectives do not mix with those of `World`."""

    mesh: DeviceMesh
    rank: int
    size: int
    device: torch.device

    def gather(self, own: torch.Tensor, total: int) -> torch.Tensor:
        """(total,) all ranks' shards of a 1-D tensor, concatenated; each is ceil(total / size) long, or the rest."""
        per_rank = -(-total // self.size)
        padded = own.new_zeros(per_rank)
        padded[: len(own)] = own
        whole = own.new_empty(per_rank * self.size)
        parts = list(whole.split(per_rank))
        dist.all_gather(parts, padded, group=self.mesh.get_group())
        return whole[:total]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's plain-data value, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.mesh.get_group())
        return values
