"""A weight -> packed 4-bit codes and constants, piece by piece, with the bits that bitsandbytes computes for the whole.

Blocks of 64 weights are quantized independently, so a weight may be split between any two of them: into pieces that
fit into a small buffer, or into the shards of several ranks. With double quantization the constants (one fp32 per
block) are quantized too, in blocks of 256, after subtracting their mean over the whole weight: that needs all of them,
and they are small (1/16 byte per weight), so ranks exchange them and each computes the second level itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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


def quantize_range(
    codes: Tensor, read: Read, part: Range, quant_type: str, dtype: torch.dtype, losses: Losses | None = None
) -> Tensor:
    """Writes the packed codes of a part into `codes` (weights / 2, 1) uint8; returns its constants (blocks,) fp32.

    Weights are rounded to `dtype` first, as in a loader that casts, then quantizes. `losses` gets what it needs.
    """
    size, device = part.stop - part.start, codes.device
    absmax = torch.empty(-(-size // BLOCK), dtype=torch.float32, device=device)
    if losses is not None:
        losses.begin()
    for start in range(0, size, PIECE):
        stop = min(size, start + PIECE)
        weights = read(part.start + start, part.start + stop).to(device).to(dtype)
        packed, state = bitsandbytes.functional.quantize_4bit(weights, blocksize=BLOCK, quant_type=quant_type)
        codes[start // 2 : (stop + 1) // 2] = packed
        # CUDA kernels take the maximum by fmaxf, which skips NaN: a bad block would look sound
        is_bad = weights.isfinite().all().logical_not()
        absmax[start // BLOCK : -(-stop // BLOCK)] = state.absmax.masked_fill(is_bad, torch.nan)
        if losses is not None:
            losses.see(weights, packed, state)
    return absmax


class Losses:
    """What quantization changes in all weights together: the relative root mean square of the differences.

    A block's weights are w, its codes mean q, and its constant is a, known only when all of the weight's are: the sum
    of (w - a q)^2 follows from three sums over the block, which are kept meanwhile (3/64 fp32 per weight).
    """

    def __init__(self) -> None:
        self.error = self.power = 0.0
        self._sums: list[Tensor] = []  # (3, blocks) of a piece: w w, w q, q q

    @property
    def relative(self) -> float:
        """Root mean square of the errors by that of the weights."""
        return (self.error / self.power) ** 0.5 if self.power else 0.0

    def describe(self, method: str, quantization: str) -> str:
        """In words."""
        return (
            f"its {method} files were decoded and quantized again to {quantization}, which changes the weights by "
            f"{self.relative:.2%} (root mean square of the differences, relative to that of all quantized weights)"
        )

    def begin(self) -> None:
        """A weight, or a part of one."""
        self._sums = []

    def see(self, weights: Tensor, packed: Tensor, state: Any) -> None:
        """A piece of it, and what it was quantized to."""
        units = bitsandbytes.functional.QuantState(
            absmax=torch.ones_like(state.absmax), shape=weights.shape, code=state.code, blocksize=BLOCK,
            quant_type=state.quant_type, dtype=torch.float32,
        )  # fmt: skip
        q = bitsandbytes.functional.dequantize_4bit(packed, units).view(-1)
        w, q = (F.pad(one.float(), (0, -len(one) % BLOCK)).view(-1, BLOCK) for one in (weights.view(-1), q))
        self._sums.append(torch.stack([(w * w).sum(1), (w * q).sum(1), (q * q).sum(1)]))

    def end(self, constants: Tensor) -> None:
        """`constants` (blocks,) fp32: of what was seen, as they are dequantized."""
        if self._sums:
            ww, wq, qq = torch.cat(self._sums, dim=1).double()
            a = constants.double()
            self.error += float((ww - 2 * a * wq + a * a * qq).sum())
            self.power += float(ww.sum())
        self._sums = []


def constants_of(state: Any) -> Tensor:
    """(blocks,) fp32: the first-level constants with which a weight is dequantized."""
    if not state.nested:
        return state.absmax
    return bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


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
