"""Bytes that one rank holds at its peak, item by item, from the config and the shapes of the model.

    persistent      base, constants, adapters, gradients, optimizer, buffers of the strategy
  + at the peak     saved activations, one layer's working set, or the loss's, whichever moment is the largest
  + not tensors     CUDA context, NCCL, what the allocator holds and cannot give

`MemoryPlan.tensor_bytes` is what torch.cuda.max_memory_allocated reports; `peak_bytes` is what the GPU must have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import RunConfig
from .layers import BLOCK, NESTED_BLOCK, HeadBytes, LayerBytes, LayerSettings, head_bytes, layer_bytes
from .shapes import ModelShapes, adapted_linears
from .strategies import Sharing, sharing

MIB, GIB = 2**20, 2**30

ALIGNMENT = 256  # flat.ALIGNMENT, elements
CONTEXT_BYTES = 500 * MIB
"""CUDA context with the kernels of torch and bitsandbytes: 400 to 550 MiB on Ampere to Hopper, outside of PyTorch."""
NCCL_BYTES = 350 * MIB
"""A communicator's channel buffers (up to 32 channels of 10 MiB over NVLink), outside of PyTorch."""
WORKSPACE_BYTES = 32 * MIB
"""cuBLAS workspace of Hopper (:4096:8, 8 MiB before); PyTorch allocates it once a stream."""
RESERVE_SHARE = 0.02
"""Of all tensors: blocks that are split and cannot be given to a larger request. Needs expandable segments."""
HOST_PROCESS_BYTES = 3 * GIB
"""Python, torch with its CUDA libraries, transformers: resident size of a rank that has done nothing yet."""
STATE_SIZES = {"adamw": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}


@dataclass(frozen=True)
class Item:
    """One line of a plan."""

    size: int  # bytes
    note: str
    is_tensor: bool = True  # PyTorch's allocator holds it
    is_pageable: bool = False  # may move to host memory when the GPU is full


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank needs. `advice` is filled by `choose`."""

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
        """On the device, with everything."""
        return sum(item.size for item in self.items.values())

    @property
    def pageable_bytes(self) -> int:
        return sum(item.size for item in self.items.values() if item.is_pageable)

    @property
    def tensor_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated will say."""
        return sum(item.size for item in self.items.values() if item.is_tensor)

    @property
    def host_peak_bytes(self) -> int:
        """Resident host memory of one rank; the page cache is not counted."""
        return sum(item.size for item in self.host_items.values())

    @property
    def paged_out_bytes(self) -> int:
        """Pageable bytes that have no room on the device."""
        if self.device_bytes is None:
            return 0
        return max(0, min(self.pageable_bytes, self.peak_bytes - self.device_bytes))

    @property
    def headroom_bytes(self) -> int | None:
        """Free on the device at the peak, before anything is paged out; negative: missing even with all of it."""
        if self.device_bytes is None:
            return None
        return self.device_bytes - self.peak_bytes + self.paged_out_bytes

    @property
    def fits(self) -> bool | None:
        """None without a device to fit."""
        return None if self.headroom_bytes is None else self.headroom_bytes >= 0

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

    def __str__(self) -> str:
        return json.dumps(self.to_json())

    def with_advice(self, advice: tuple[str, ...]) -> MemoryPlan:
        return replace(self, advice=advice)


def plan_memory(
    config: RunConfig,
    shapes: ModelShapes,
    *,
    world_size: int,
    local_world_size: int,
    device_bytes: int | None,
    recompute: int | None = None,  # layers; None: as the config says, auto = all
    micro_rows: int | None = None,  # None: as the config says, auto = 1
) -> MemoryPlan:
    """The plan of one rank on a GPU of `device_bytes`. Raises UserError for target modules that match nothing."""
    count = planned_recompute(config, shapes) if recompute is None else recompute
    rows = planned_micro_rows(config) if micro_rows is None else micro_rows
    shared = sharing(config.strategy.name, world_size)
    adapters = [] if config.lora is None else adapter_sizes(config.lora.rank, config.lora.target_modules, shapes)
    if config.lora is None:
        trainable = shapes.base_parameters
        aligned = trainable  # biases and norms are rounded up too: below 0.01 %
    else:
        trainable = sum(adapters)
        aligned = sum(_aligned(size) for size in adapters)
    items = _persistent(config, shapes, aligned, shared)
    moment = _largest_moment(config, shapes, rows, count)
    for name, item in moment.items.items():
        items[name] = item
    largest_layer = 2 * max(linear.num_weights for linear in shapes.linears)
    items |= shared.buffers(
        aligned_bytes=4 * aligned,
        layer_bytes=_base_bytes(config, shapes)[0] // shapes.num_layers,
        largest_bytes=largest_layer,
        make=Item,
    )
    items["cuBLAS workspace"] = Item(WORKSPACE_BYTES, "allocated once by PyTorch; 32 MiB on Hopper, 8 MiB before")
    tensors = sum(item.size for item in items.values() if item.is_tensor)
    items["CUDA context"] = Item(CONTEXT_BYTES, "kernels and stacks of the driver, outside of PyTorch", is_tensor=False)
    if world_size > 1:
        items["NCCL"] = Item(NCCL_BYTES, "buffers of one communicator, outside of PyTorch", is_tensor=False)
    items["allocator reserve"] = Item(
        int(RESERVE_SHARE * tensors), f"{RESERVE_SHARE:.0%} of all tensors for fragments", is_tensor=False
    )
    return MemoryPlan(
        items={name: item for name, item in items.items() if item.size},
        host_items=_host(config, shapes, aligned, shared, local_world_size, moment.saved_bytes),
        peak_at=moment.name,
        device_bytes=device_bytes,
        recompute=count,
        num_layers=shapes.num_layers,
        micro_rows=rows,
        row_tokens=config.data.row_tokens,
        base_parameters=shapes.base_parameters,
        trainable_parameters=trainable,
        strategy=config.strategy.name,
        world_size=world_size,
        remarks=_remarks(config, shapes),
    )


def planned_recompute(config: RunConfig, shapes: ModelShapes) -> int:
    """Layers that are recomputed when nobody chooses: as the config says, auto = all."""
    asked = config.memory.recompute
    if isinstance(asked, int):
        return min(asked, shapes.num_layers)
    return 0 if asked == "none" else shapes.num_layers


def planned_micro_rows(config: RunConfig) -> int:
    """Rows a rank holds at a time when nobody chooses: as the config says, auto = 1."""
    asked: Any = config.batch.micro_rows
    return asked if isinstance(asked, int) else 1


# --- what stays -------------------------------------------------------------------------------------------------------


def adapter_sizes(rank: int, target_modules: str | tuple[str, ...], shapes: ModelShapes) -> list[int]:
    """Number of weights of each A and B."""
    return [
        rank * width
        for chosen in adapted_linears(shapes, target_modules)
        for linear in shapes.linears
        if linear.name in chosen
        for width in (linear.inputs, linear.outputs)
    ]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _base_bytes(config: RunConfig, shapes: ModelShapes) -> tuple[int, int, str]:
    """(weights of the linear layers, their quantization constants, what they are)."""
    kind, size = config.model.quantization, _compute_size(config)
    matrices = [linear for linear in shapes.linears]
    if kind == "none":
        return shapes.linear_weights * size, 0, f"linear layers, {size} bytes a weight"
    if kind == "int8":
        constants = shapes.num_layers * sum(4 * linear.outputs for linear in matrices)
        return shapes.linear_weights, constants, "linear layers, 1 byte a weight"
    codes = shapes.num_layers * sum(-(-linear.num_weights // 2) for linear in matrices)
    return (
        codes,
        shapes.num_layers * sum(_constants(linear.num_weights, config.model.double_quant) for linear in matrices),
        (f"linear layers, 4 bits a weight ({kind})"),
    )


def _constants(num_weights: int, double_quant: bool) -> int:
    """Bytes of quantization constants of one matrix."""
    blocks = -(-num_weights // BLOCK)
    table = 16 * 4  # the 16 values of the 4-bit type
    if not double_quant:
        return 4 * blocks + table
    # one byte a block, one fp32 for 256 blocks, the 256 values of the 8-bit type, the mean
    return blocks + 4 * -(-blocks // NESTED_BLOCK) + 256 * 4 + 4 + table


def _compute_size(config: RunConfig) -> int:
    return 4 if config.model.compute_dtype == "float32" else 2


def _persistent(config: RunConfig, shapes: ModelShapes, aligned: int, shared: Sharing) -> dict[str, Item]:
    if config.lora is None:
        items = {"weights": Item(4 * shapes.base_parameters, "fp32 masters of all weights")}
    else:
        base, constants, what = _base_bytes(config, shapes)
        size = _compute_size(config)
        items = {
            "base": Item(int(base * shared.base(config.model.quantization)), what),
            "quantization constants": Item(
                constants, "double quantization" if config.model.double_quant else "one fp32 for 64 weights"
            ),
            "embeddings, head, norms": Item(shapes.other_weights * size, f"not quantized, {size} bytes a weight"),
            "adapters": Item(int(4 * aligned * shared.adapters), "fp32 masters of A and B"),
        }
    items["gradients"] = Item(
        int(4 * aligned * shared.gradients), "fp32, one flat buffer, all micro-steps add up in it"
    )
    return items | _optimizer(config.optim.name, aligned, shared)


def _optimizer(name: str, aligned: int, shared: Sharing) -> dict[str, Item]:
    held = int(aligned * shared.optimizer)
    size = STATE_SIZES[name]
    if shared.is_offloaded:
        return {}
    items = {}
    scales = 2 * 4 * -(-held // ALIGNMENT) if size == 2 else 0
    what = f"AdamW, 2 x {'fp32' if size == 8 else '8 bit'} a weight"
    if name.startswith("paged"):
        items["optimizer, pageable"] = Item(
            size * held, f"{what}, in managed memory: moves to the host when the GPU is full", is_tensor=False,
            is_pageable=True,
        )  # fmt: skip
        items["optimizer"] = Item(scales, "scales of the 8-bit states")
    else:
        items["optimizer"] = Item(size * held + scales, what)
    if shared.has_master_partition:
        items["optimizer"] = Item(
            items["optimizer"].size + 4 * held, items["optimizer"].note + ", and DeepSpeed's fp32 copy of its share"
        )
    return items


# --- what comes and goes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment, besides what stays."""

    name: str
    items: dict[str, Item]
    saved_bytes: int  # saved activations over all layers, after the forward pass

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items.values())


def _largest_moment(config: RunConfig, shapes: ModelShapes, rows: int, recompute: int) -> Moment:
    tokens = rows * config.data.row_tokens
    size = _compute_size(config)
    row = tokens * shapes.hidden * size
    layers = _layers(config, shapes, tokens)
    # between forward and backward a recomputed layer keeps its input, others what they saved (their input among it
    # where a norm saves it as it is)
    keeps = [row if index < recompute else layer.saved.total + layer.kept_input for index, layer in enumerate(layers)]
    all_saved = sum(keeps)
    head = head_bytes(shapes, tokens, size)
    steady = {
        "batch": Item(
            5 * 8 * tokens + 2 * tokens * shapes.rotary_dim * size, "token ids, positions, labels, rotary tables"
        )
    }
    moments = [_loss_moment(head, all_saved, steady)]
    below = all_saved
    for index in reversed(range(len(layers))):
        layer, is_recomputed = layers[index], index < recompute
        below -= keeps[index]
        if index in (len(layers) - 1, recompute - 1):
            moments += _layer_moments(
                layer, below, row if is_recomputed else layer.kept_input, row, is_recomputed, steady
            )
    largest = max(moments, key=lambda moment: moment.size)
    return replace(largest, saved_bytes=all_saved)


def _layers(config: RunConfig, shapes: ModelShapes, tokens: int) -> list[LayerBytes]:
    lora = config.lora
    settings = LayerSettings(
        tokens=tokens,
        compute_size=_compute_size(config),
        rank=0 if lora is None else lora.rank,
        dropout=0.0 if lora is None else lora.dropout,
        is_lean=config.model.kernels == "auto" and (lora is None or lora.variant != "dora"),
        quantization=config.model.quantization,
        double_quant=config.model.double_quant,
        attention="sdpa" if config.model.attention == "sdpa" or config.model.compute_dtype == "float32" else "flash",
        longest=config.data.row_tokens,
    )
    chosen = [frozenset()] * shapes.num_layers if lora is None else adapted_linears(shapes, lora.target_modules)
    known: dict[tuple[frozenset[str], bool], LayerBytes] = {}
    layers = []
    for index, adapted in enumerate(chosen):
        key = (adapted, index > 0)  # the embedding is frozen: nothing before the first adapter has a gradient
        if key not in known:
            known[key] = layer_bytes(shapes, replace(settings, adapted=adapted), has_grad_input=index > 0)
        layers.append(known[key])
    return layers


def _loss_moment(head: HeadBytes, saved: int, steady: dict[str, Item]) -> Moment:
    return Moment(
        "the loss",
        {
            "saved activations": Item(saved, "of all layers"),
            "last hidden states": Item(head.peak - head.logits, "the last norm, hidden states, their gradient"),
            "loss chunk": Item(head.logits, "fp32 logits of one chunk, and what is made of them"),
            **steady,
        },
        saved,
    )


def _layer_moments(
    layer: LayerBytes, below: int, own_input: int, row: int, is_recomputed: bool, steady: dict[str, Item]
) -> Iterator[Moment]:
    """One layer's forward (or recomputation) and backward, over what the layers before it keep."""
    kept = {"saved activations": Item(below + own_input, "of the layers before it, and its input")}
    for name, live, extra in (
        ("a layer's forward pass", layer.forward_peak, row),
        ("a layer's backward pass", layer.backward_peak, 0),
    ):
        again = "recomputed and " if is_recomputed else ""
        yield Moment(
            name,
            {
                **kept,
                "one layer's activations": Item(live.activations + extra, f"{again}alive in one layer at a time"),
                "one layer's gradients": Item(live.gradients, "of activations"),
                "dequantized matrix": Item(live.weights, "and adapters in the compute type"),
                **steady,
            },
            below,
        )


# --- host, remarks ----------------------------------------------------------------------------------------------------


def _host(
    config: RunConfig, shapes: ModelShapes, aligned: int, shared: Sharing, local_world_size: int, saved_bytes: int
) -> dict[str, Item]:
    held = int(aligned * shared.optimizer)
    states = STATE_SIZES[config.optim.name] * held
    largest = max(shapes.embedding_weights, *(linear.num_weights for linear in shapes.linears)) * 2
    items = {
        "process": Item(HOST_PROCESS_BYTES, "Python, torch and its CUDA libraries"),
        "loading": Item(2 * largest, "the largest tensor in 16 bit, twice"),
        "checkpoint": Item(states + 4 * aligned, "rank 0 copies optimizer states and adapters to write them"),
    }
    if shared.is_offloaded:
        items["optimizer"] = Item((STATE_SIZES["adamw"] + 8) * held, "states, fp32 weights and gradients, pinned")
    elif config.optim.name.startswith("paged"):
        items["optimizer, paged out"] = Item(states, "at worst: all pages on the host")
    if config.memory.offload_activations:
        items["saved activations"] = Item(saved_bytes, "pinned, between forward and backward")
    return items


def _remarks(config: RunConfig, shapes: ModelShapes) -> tuple[str, ...]:
    remarks = []
    if not shapes.is_exact:
        remarks.append(f"{shapes.family} is not listed here: its layers are assumed to work like Llama's")
    if config.lora is not None and config.lora.variant == "dora":
        remarks.append("dora needs more than lora for a moment; not counted here")
    if shapes.has_softcap and config.model.attention != "sdpa":
        remarks.append("capped attention scores: flash-attn is assumed; without it scores exist whole")
    return tuple(remarks)
