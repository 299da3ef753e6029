"""Loading a base whole or sharded, on ranks."""

from __future__ import annotations

from typing import Any

import torch

from qlora_dist.model import (
    load_base,
)


def load(folder: Any, shards: Any, device: torch.device | None = None, **changes: Any) -> Any:
    options = {
        "quantization": "nf4",
        "double_quant": True,
        "compute_dtype": torch.bfloat16,
        "attention": "auto",
        **changes,
    }
    return load_base(str(folder), device=device or torch.device("cpu"), shards=shards, **options)


def world_and_shards() -> tuple[Any, Any]:
    from qlora_dist.cluster.world import World

    world = World.init()
    return world, world.shard_group()
