"""What stays in memory for the whole run, item by item: on the device and on the host."""

from __future__ import annotations

from ..config import RunConfig
from ..config.names import AdaptedExperts
from ..config.quantization import Quantization, quantized_bytes
from .constants import ALIGNMENT, HOST_PROCESS_BYTES, STATE_SIZES, Item, state_bytes
from .shapes import ModelShapes, adapted_parts
from .strategies import Sharing

CODE_TABLE_BYTES = 16 * 4  # the values of a 4-bit type, per matrix
NESTED_TABLE_BYTES = 256 * 4 + 4  # the values of the constants' 8-bit type, and the constants' mean

# --- on the device ----------------------------------------------------------------------------------------------------


def adapter_sizes(
    rank: int,
    target_modules: str | tuple[str, ...],
    shapes: ModelShapes,
    has_magnitudes: bool = False,
    experts: AdaptedExperts = "shared",
) -> list[int]:
    """Number of weights of each A and B (and of each magnitude vector of dora)."""
    sizes = []
    for index, chosen in enumerate(adapted_parts(shapes, target_modules, experts)):
        kind = shapes.at(index)
        for linear in kind.linears:
            if linear.name in chosen:
                sizes += [rank * linear.inputs, rank * linear.outputs]
                sizes += [linear.outputs] if has_magnitudes else []
        if kind.experts is not None and kind.experts.name in chosen:
            sizes += [kind.experts.num_experts * rank * width for pair in kind.experts.matrices for width in pair]
    return sizes


def aligned_size(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def base_bytes(config: RunConfig, shapes: ModelShapes) -> tuple[int, int, str]:
    """(weights of the linear layers and experts, their quantization constants, what they are)."""
    kind, size = config.model.quantization, compute_size(config)
    what = "linear layers" + (" and experts" if shapes.expert_weights else "")
    if kind == "none":
        return (shapes.linear_weights + shapes.expert_weights) * size, 0, f"{what}, {size} bytes per weight"
    double = config.model.double_quant
    codes = constants = 0
    for one, count in shapes.each_layer():
        own = _quantized_layer(one, kind, double)
        codes, constants = codes + count * own[0], constants + count * own[1]
    return codes, constants, f"{what}, {'1 byte' if kind == 'int8' else f'4 bits ({kind})'} per weight"


def _quantized_layer(shapes: ModelShapes, kind: Quantization, double: bool) -> tuple[int, int]:
    """(codes, constants and tables) of one decoder layer."""
    tables = 0 if kind == "int8" else CODE_TABLE_BYTES + (NESTED_TABLE_BYTES if double else 0)
    matrices = [quantized_bytes(linear.num_weights, linear.outputs, kind, double) for linear in shapes.linears]
    codes = sum(one.codes for one in matrices)
    constants = sum(one.constants + one.nested + tables for one in matrices)
    if (experts := shapes.experts) is not None:
        for outputs, inputs in experts.matrices:
            one = quantized_bytes(outputs * inputs, outputs, kind, double)
            codes += experts.num_experts * one.codes
            # each expert's matrix has its own mean of the constants; a layer's experts share the tables
            constants += experts.num_experts * (one.constants + one.nested + (4 if double else 0)) + tables
    return codes, constants


def compute_size(config: RunConfig) -> int:
    return 4 if config.model.compute_dtype == "float32" else 2


def persistent(config: RunConfig, shapes: ModelShapes, aligned: int, shared: Sharing) -> dict[str, Item]:
    if config.lora is None:
        items = {"weights": Item(int(4 * shapes.base_parameters * shared.adapters), "fp32 masters of all weights")}
        if compute_size(config) != 4:
            cast = 2 * (shapes.linear_weights + shapes.expert_weights + shapes.head_weights)
            items["weights, cast"] = Item(cast, "in the compute type; autocast keeps them from forward to backward")
    else:
        base, constants, what = base_bytes(config, shapes)
        size, tables = compute_size(config), shapes.embedding_weights + shapes.head_weights
        items = {
            "base": Item(int(base * shared.base(config.model.quantization)), what),
            "quantization constants": Item(
                int(constants * shared.base(config.model.quantization)),
                "double quantization" if config.model.double_quant else "one fp32 per 64 weights",
            ),
            "embeddings, head, norms": Item(
                int((shapes.other_weights - tables + tables * shared.tables) * size),
                f"not quantized, {size} bytes per weight",
            ),
            "adapters": Item(int(4 * aligned * shared.adapters), "fp32 masters of A and B"),
        }
    items["gradients"] = Item(
        int(4 * aligned * shared.gradients), "fp32, one flat buffer, accumulated over micro-steps"
    )
    return items | _optimizer(config.optim.name, aligned, shared)


def _optimizer(name: str, aligned: int, shared: Sharing) -> dict[str, Item]:
    held = int(aligned * shared.optimizer)
    if shared.is_offloaded:
        return {}
    items = {}
    states, scales = state_bytes(name, held)
    what = f"AdamW, 2 x {'8 bit' if scales else 'fp32'} per weight"
    if name.startswith("paged"):
        items["optimizer, pageable"] = Item(
            states, f"{what}, in managed memory: moves to the host when the GPU is full", is_tensor=False,
            is_pageable=True,
        )  # fmt: skip
        items["optimizer"] = Item(scales, "scales of the 8-bit states")
    else:
        items["optimizer"] = Item(states + scales, what)
    if shared.has_master_partition:
        items["optimizer"] = Item(
            items["optimizer"].size + 4 * held, items["optimizer"].note + ", and DeepSpeed's fp32 copy of its shard"
        )
    return items


# --- on the host ------------------------------------------------------------------------------------------------------


def host(config: RunConfig, shapes: ModelShapes, aligned: int, shared: Sharing, saved_bytes: int) -> dict[str, Item]:
    held = int(aligned * shared.optimizer)
    states, _ = state_bytes(config.optim.name, held)
    layers = [linear for one, _ in shapes.each_layer() for linear in one.linears]
    largest = max(shapes.embedding_weights, *(linear.num_weights for linear in layers)) * 2
    items = {
        "process": Item(HOST_PROCESS_BYTES, "Python, torch and its CUDA libraries"),
        "loading": Item(2 * largest, "twice the largest tensor (16-bit)"),
        "checkpoint": Item(states + 4 * aligned, "rank 0 copies optimizer states and adapters to write them"),
    }
    if shared.is_offloaded:
        items["optimizer"] = Item((STATE_SIZES["adamw"] + 8) * held, "states, fp32 weights and gradients, pinned")
    elif config.optim.name.startswith("paged"):
        items["optimizer, paged out"] = Item(states, "at worst, all pages on the host")
    if shared.has_host_base:
        base, constants, _ = base_bytes(config, shapes)
        whole = base + constants + compute_size(config) * (shapes.embedding_weights + shapes.head_weights)
        items["base"] = Item(whole // shared.shard_ranks, "this rank's part, pinned; crosses the bus at every use")
    if config.memory.offload_activations:
        items["saved activations"] = Item(saved_bytes, "pinned, between forward and backward")
    return items
