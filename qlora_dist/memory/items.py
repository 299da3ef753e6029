"""What stays in memory for a whole run, item by item: on the device and on the host."""

from __future__ import annotations

from ..config import RunConfig
from .constants import ALIGNMENT, HOST_PROCESS_BYTES, STATE_SIZES, Item
from .layers import BLOCK, NESTED_BLOCK
from .shapes import ModelShapes, adapted_linears
from .strategies import Sharing

# --- on the device ----------------------------------------------------------------------------------------------------


def adapter_sizes(
    rank: int, target_modules: str | tuple[str, ...], shapes: ModelShapes, has_magnitudes: bool = False
) -> list[int]:
    """Number of weights of each A and B (and of each magnitude vector of dora)."""
    return [
        size
        for chosen in adapted_linears(shapes, target_modules)
        for linear in shapes.linears
        if linear.name in chosen
        for size in (
            rank * linear.inputs,
            rank * linear.outputs,
            *([linear.outputs] if has_magnitudes else []),
        )
    ]


def aligned_size(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def base_bytes(config: RunConfig, shapes: ModelShapes) -> tuple[int, int, str]:
    """(weights of the linear layers, their quantization constants, what they are)."""
    kind, size = config.model.quantization, compute_size(config)
    matrices = shapes.linears
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


def compute_size(config: RunConfig) -> int:
    return 4 if config.model.compute_dtype == "float32" else 2


def persistent(config: RunConfig, shapes: ModelShapes, aligned: int, shared: Sharing) -> dict[str, Item]:
    if config.lora is None:
        items = {"weights": Item(int(4 * shapes.base_parameters * shared.adapters), "fp32 masters of all weights")}
        if compute_size(config) != 4:
            cast = 2 * (shapes.linear_weights + shapes.head_weights)
            items["weights, cast"] = Item(cast, "autocast keeps them from forward to backward, in the compute type")
    else:
        base, constants, what = base_bytes(config, shapes)
        size, tables = compute_size(config), shapes.embedding_weights + shapes.head_weights
        items = {
            "base": Item(int(base * shared.base(config.model.quantization)), what),
            "quantization constants": Item(
                int(constants * shared.base(config.model.quantization)),
                "double quantization" if config.model.double_quant else "one fp32 for 64 weights",
            ),
            "embeddings, head, norms": Item(
                int((shapes.other_weights - tables + tables * shared.tables) * size),
                f"not quantized, {size} bytes a weight",
            ),
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


# --- on the host ------------------------------------------------------------------------------------------------------


def host(
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
