"""One line of a plan, and the constants that cannot be derived, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from ..files import GIB, MIB

ALIGNMENT = 256  # optim.flat.ALIGNMENT, elements
CONTEXT_BYTES = 500 * MIB
"""CUDA context with the kernels of torch and bitsandbytes: 400 to 550 MiB on Ampere to Hopper, outside PyTorch."""
NCCL_BYTES = 350 * MIB
"""A communicator's channel buffers (up to 32 channels of 10 MiB over NVLink), outside PyTorch."""
OFFLOAD_AHEAD_BYTES = 256 * MIB
"""model.activation_offload.AHEAD_BYTES: offloaded activations that are prefetched before they are needed."""
OFFLOAD_LEAST_BYTES = MIB
"""model.activation_offload.MIN_BYTES: smaller activations stay on the device."""
WORKSPACE_BYTES = 2 * 32 * MIB
"""cuBLAS workspaces on Hopper (:4096:8; 8 MiB each on earlier GPUs): PyTorch allocates one for the thread of the
forward pass and one for the thread of the backward pass, and keeps them."""
RESERVE_SHARE = 0.02
"""Fraction of all tensors lost to split blocks too small for the next request. Assumes expandable segments."""
HOST_PROCESS_BYTES = 3 * GIB
"""Python, torch with its CUDA libraries, transformers: resident size of a rank that has just started."""
STATE_SIZES = {"adamw": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of Adam's two states per trained weight."""


def state_bytes(optimizer: str, num_weights: int) -> tuple[int, int]:
    """(Adam's two states, their scales: one fp32 per 256 elements of an 8-bit state), bytes."""
    size = STATE_SIZES[optimizer]
    return size * num_weights, 2 * 4 * -(-num_weights // ALIGNMENT) if size == 2 else 0


@dataclass(frozen=True)
class Item:
    """One line of a plan."""

    size: int  # bytes
    note: str
    is_tensor: bool = True  # allocated by PyTorch
    is_pageable: bool = False  # may move to host memory when the GPU is full
