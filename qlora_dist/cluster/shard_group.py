"""The ranks over which one base is sharded."""

from __future__ import annotations

import datetime
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

    @classmethod
    def create(
        cls, rank: int, size: int, each: int, device: torch.device, timeout: datetime.timedelta
    ) -> ShardGroup | None:
        """The group of `each` consecutive ranks that this one is in; None for a group of one. Called by all ranks."""
        assert size % each == 0
        if each == 1:
            return None
        # every rank creates every group, in the same order
        groups = [dist.new_group(list(range(first, first + each)), timeout) for first in range(0, size, each)]
        return cls(DeviceMesh.from_group(groups[rank // each], device.type), rank % each, each, device)

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
