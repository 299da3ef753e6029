"""Memory of one rank at its peak, item by item, from the config and the shapes of the model.

    persistent      base, constants, adapters, gradients, optimizer, buffers of the strategy
  + at the peak     saved activations, the working set of one layer or of the loss, at the largest moment
  + not tensors     CUDA context, NCCL, fragmentation in the allocator

`MemoryPlan.tensor_bytes` is what torch.cuda.max_memory_allocated reports; `peak_bytes` is what the GPU needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..config import RunConfig
from .constants import CONTEXT_BYTES, NCCL_BYTES, RESERVE_SHARE, WORKSPACE_BYTES, Item
from .resident import adapter_sizes, aligned_size, base_bytes, compute_size, host, persistent
from .shapes import ModelShapes
from .step_peak import largest_moment
from .strategies import sharing


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that one rank needs. `choose` fills in `advice`."""

    items: dict[str, Item]  # on the device, at the peak
    host_items: dict[str, Item]
    peak_at: str  # the moment of the peak, in words
    device_bytes: int | None
    recompute: int  # decoder layers whose activations are recomputed
    num_layers: int
    micro_rows: int
    row_tokens: int
    base_parameters: int
    trainable_parameters: int
    strategy: str
    world_size: int
    advice: tuple[str, ...] = ()
    remarks: tuple[str, ...] = field(default=())  # what this plan assumes

    @property
    def peak_bytes(self) -> int:
        """Total on the device."""
        return sum(item.size for item in self.items.values())

    @property
    def pageable_bytes(self) -> int:
        return sum(item.size for item in self.items.values() if item.is_pageable)

    @property
    def tensor_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated will report."""
        return sum(item.size for item in self.items.values() if item.is_tensor)

    @property
    def host_peak_bytes(self) -> int:
        """Resident host memory of one rank; the page cache is not counted."""
        return sum(item.size for item in self.host_items.values())

    @property
    def paged_out_bytes(self) -> int:
        """Pageable bytes that do not fit on the device."""
        if self.device_bytes is None:
            return 0
        return max(0, min(self.pageable_bytes, self.peak_bytes - self.device_bytes))

    @property
    def headroom_bytes(self) -> int | None:
        """Free on the device at the peak; 0 while paging suffices; negative: missing with everything paged out."""
        if self.device_bytes is None:
            return None
        return self.device_bytes - self.peak_bytes + self.paged_out_bytes

    @property
    def fits(self) -> bool | None:
        """None if no device is given."""
        return None if self.headroom_bytes is None else self.headroom_bytes >= 0

    @property
    def is_hopeless(self) -> bool:
        """Does not fit, even without the allocator's reserve."""
        return self.headroom_bytes is not None and self.headroom_bytes + self.items["allocator reserve"].size < 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "base_parameters": self.base_parameters,
            "trainable_parameters": self.trainable_parameters,
            "items": {name: item.size for name, item in self.items.items()},
            "notes": {name: item.note for name, item in self.items.items()},
            "host_items": {name: item.size for name, item in self.host_items.items()},
            "peak_bytes": self.peak_bytes,
            "peak_at": self.peak_at,
            "tensor_bytes": self.tensor_bytes,
            "pageable_bytes": self.pageable_bytes,
            "paged_out_bytes": self.paged_out_bytes,
            "host_peak_bytes": self.host_peak_bytes,
            "device_bytes": self.device_bytes,
            "fits": self.fits,
            "headroom_bytes": self.headroom_bytes,
            "recompute": self.recompute,
            "num_layers": self.num_layers,
            "micro_rows": self.micro_rows,
            "row_tokens": self.row_tokens,
            "strategy": self.strategy,
            "world_size": self.world_size,
            "advice": list(self.advice),
            "remarks": list(self.remarks),
        }

    def with_advice(self, advice: tuple[str, ...]) -> MemoryPlan:
        return replace(self, advice=advice)


def plan_memory(
    config: RunConfig,
    shapes: ModelShapes,
    *,
    world_size: int,
    device_bytes: int | None,
    recompute: int | None = None,  # layers; None: from the config, auto = all
    micro_rows: int | None = None,  # None: from the config, auto = 1
) -> MemoryPlan:
    """The plan of one rank on a GPU of `device_bytes`. Raises UserError for target modules that match nothing."""
    count = planned_recompute(config, shapes) if recompute is None else recompute
    rows = planned_micro_rows(config) if micro_rows is None else micro_rows
    strategy = config.strategy
    shared = sharing(strategy.name, world_size, strategy.offload, strategy.shard_ranks(world_size))
    lora = config.lora
    if lora is None:
        trainable = aligned = shapes.base_parameters
    else:
        sizes = adapter_sizes(lora.rank, lora.target_modules, shapes, lora.variant == "dora", lora.experts)
        trainable, aligned = sum(sizes), sum(aligned_size(size) for size in sizes)
    moment = largest_moment(config, shapes, rows, count)
    saving = replace(moment, name="saving a checkpoint", items=shared.saving(4 * aligned))
    moment = max(moment, saving, key=lambda one: one.size)
    base, constants, _ = base_bytes(config, shapes)
    head = shapes.vocabulary * shapes.hidden * compute_size(config)
    buffers = shared.buffers(4 * aligned, (base + constants) // shapes.num_layers, head)
    items = persistent(config, shapes, aligned, shared) | moment.items | buffers
    what = "one for the forward, one for the backward thread; 32 MiB each on Hopper, else 8 MiB"
    items["cuBLAS workspace"] = Item(WORKSPACE_BYTES, what)
    tensors = sum(item.size for item in items.values() if item.is_tensor)
    items["CUDA context"] = Item(CONTEXT_BYTES, "driver kernels and stacks, outside PyTorch", is_tensor=False)
    if groups := shared.num_communicators:
        what = f"buffers of {groups} communicator{'s' if groups > 1 else ''}, outside PyTorch"
        items["NCCL"] = Item(groups * NCCL_BYTES, what, is_tensor=False)
    items["allocator reserve"] = Item(
        int(RESERVE_SHARE * tensors), f"{RESERVE_SHARE:.0%} of all tensors, for fragmentation", is_tensor=False
    )
    return MemoryPlan(
        items={name: item for name, item in items.items() if item.size},
        host_items=host(config, shapes, aligned, shared, moment.saved_bytes),
        peak_at=moment.name,
        device_bytes=device_bytes,
        recompute=count,
        num_layers=shapes.num_layers,
        micro_rows=rows,
        row_tokens=config.data.row_tokens,
        base_parameters=shapes.base_parameters,
        trainable_parameters=trainable,
        strategy=strategy.name,
        world_size=world_size,
        remarks=_remarks(config, shapes),
    )


def planned_recompute(config: RunConfig, shapes: ModelShapes) -> int:
    """Number of recomputed layers in the config, auto = all."""
    recompute = config.memory.recompute
    if isinstance(recompute, int):
        return min(recompute, shapes.num_layers)
    return 0 if recompute == "none" else shapes.num_layers


def planned_micro_rows(config: RunConfig) -> int:
    """Rows per micro-batch in the config, auto = 1."""
    rows: Any = config.batch.micro_rows
    return rows if isinstance(rows, int) else 1


def _remarks(config: RunConfig, shapes: ModelShapes) -> tuple[str, ...]:
    remarks = []
    if not shapes.is_exact:
        remarks.append(f"{shapes.family} is not a known family: its layers are assumed to work like Llama's")
    if shapes.unknown:
        remarks.append(f"the activations of {shapes.unknown} are not known, and not counted")
    if shapes.max_positions is not None and config.data.row_tokens > shapes.max_positions:
        remarks.append(
            f"data.row_tokens is {config.data.row_tokens:,}, but the model was built for documents of up to "
            f"{shapes.max_positions:,} tokens"
        )
    if config.lora is None:
        remarks.append("full fine-tuning: activations are counted as for a frozen base, which saves fewer")
    if config.strategy.name == "zero3" and config.model.quantization != "none":
        remarks.append("zero3 shards a quantized base only after every rank has loaded all of it: counted in full")
    if config.lora is not None and config.lora.variant == "dora":
        remarks.append("dora's additional temporary memory is not counted")
    if shapes.has_softcap and config.model.attention != "sdpa":
        remarks.append("capped attention scores: flash-attn is assumed; without it scores are materialized")
    return tuple(remarks)
