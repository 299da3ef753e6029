"""A weight -> packed 4-bit codes and constants, piece by piece, with the bits that bitsandbytes computes for the whole.

Blocks of 64 weights are quantized independently, so a weight may be split between any two of them: into pieces that
fit into a small buffer, or into the shards of several ranks. With double quantization the constants (one fp32 per
block) are quantized too, in blocks of 256, after subtracting their mean over the whole weight: that needs all of them,
and they are small (1/16 byte per weight), so ranks exchange them and each computes the second level itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config.quantization import BLOCK, NESTED_BLOCK
from ..bitsandbytes_import import bitsandbytes

PIECE = 2**21  # weights at a time: 4 MiB of bf16. Host memory is bounded by a few pieces, not by a tensor

Read = Callable[[int, int], Tensor]  # (first, last + 1) weight in storage order -> 1-D tensor, any float type


@dataclass(frozen=True)
class Range:
    """A part of a weight in storage order."""

    start: int
    stop: int


def shard_range(numel: int, rank: int, size: int) -> Range:
    """The weights of one rank: whole blocks, split as torch.chunk splits rows. The last ranks may have none."""
    blocks = -(-numel // BLOCK)
    per_rank = -(-blocks // size)
    start, stop = (min(blocks, per_rank * index) for index in (rank, rank + 1))
    return Range(min(numel, start * BLOCK), min(numel, stop * BLOCK))


def quantize_range(codes: Tensor, read: Read, part: Range, quant_type: str, dtype: torch.dtype) -> Tensor:
    """Writes the packed codes of a part into `codes` (weights / 2, 1) uint8; returns its constants (blocks,) fp32.

    Weights are rounded to `dtype` first, as in a loader that casts, then quantizes.
    """
    size, device = part.stop - part.start, codes.device
    absmax = torch.empty(-(-size // BLOCK), dtype=torch.float32, device=device)
    for start in range(0, size, PIECE):
        stop = min(size, start + PIECE)
        weights = read(part.start + start, part.start + stop).to(device).to(dtype)
        packed, state = bitsandbytes.functional.quantize_4bit(weights, blocksize=BLOCK, quant_type=quant_type)
        codes[start // 2 : (stop + 1) // 2] = packed
        # CUDA kernels take the maximum by fmaxf, which skips NaN: a bad block would look sound
        is_bad = weights.isfinite().all().logical_not()
        absmax[start // BLOCK : -(-stop // BLOCK)] = state.absmax.masked_fill(is_bad, torch.nan)
    return absmax


def make_state(
    absmax: Tensor, shape: tuple[int, ...], quant_type: str, dtype: torch.dtype, double_quant: bool
) -> bitsandbytes.functional.QuantState:
    """The quantization state of a whole weight from all of its first-level constants (blocks,) fp32."""
    functional = bitsandbytes.functional
    offset = state2 = None
    if double_quant:
        offset = absmax.mean()
        absmax, state2 = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        state2.absmax.masked_fill_(offset.isfinite().logical_not(), torch.nan)  # bitsandbytes skips NaN here
    return functional.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=functional.get_4bit_type(quant_type, device=absmax.device),
        quant_type=quant_type,
        offset=offset,
        state2=state2,
    )
