"""Triton kernel of dequantize.py: a program takes BLOCKS blocks of 64 weights, in tiles of 8 words of 8 codes.

A word of four bytes becomes 8 weights, one 16-byte store of a 16-bit type. Products and sums are rounded one by one, as
bitsandbytes does: no fused multiply-add.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config.quantization import BLOCK, NESTED_BLOCK
from . import launching

BLOCKS = 64  # of a program
WORD = 8  # codes in 32 bits


@triton.jit(do_not_specialize=["out_step", "num_blocks"])
def _dequantize(
    codes, code, absmax, nested_absmax, nested_code, nested_offset, out, out_step, num_blocks,
    UNIT: tl.constexpr, PER_ROW: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    if nested_absmax is None:
        constant = tl.load(absmax + block, mask=inside, other=0.0)
    else:
        kind = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        constant = tl.load(nested_code + kind) * tl.load(nested_absmax + block // NESTED, mask=inside, other=0.0)
        constant += tl.load(nested_offset)
    words = tl.load(codes + block[:, None] * 8 + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0)
    # byte i // 2 of a word, its high half first
    weight = tl.arange(0, 8)
    shift = weight // 2 * 8 + (1 - weight % 2) * 4
    index = (words[:, :, None] >> shift[None, None, :]) & 15
    # from shared memory: 16 entries in 16 banks never collide
    looked_up = tl.gather(tl.load(code + tl.arange(0, 16)), tl.reshape(index, (BLOCKS * 64,)), 0)
    value = tl.reshape(looked_up, (BLOCKS, 8, 8)) * constant[:, None, None]
    start = block // PER_ROW * out_step * UNIT + block % PER_ROW * 64
    column = tl.arange(0, 8)[:, None] * 8 + weight[None, :]
    at = out + start[:, None, None] + column[None, :, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=inside[:, None, None])


def dequantize_4bit(
    codes: Tensor,
    code: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
) -> bool:
    """See dequantize.py. False, with nothing written, if blocks continue over the ends of rows, or for types or strides
    that the kernel does not take."""
    packed = codes.view(-1).view(torch.uint8)[: out.numel() // 2]
    if out.shape[1] % BLOCK or packed.data_ptr() % 4 or not launching.accepts(out):
        return False
    unit = launching.unit_of(out)
    num_blocks = out.numel() // BLOCK
    launching.start(
        _dequantize, triton.cdiv(num_blocks, BLOCKS), packed.view(torch.int32), code, absmax, nested_absmax,
        nested_code, nested_offset, out, out.stride(0) // unit, num_blocks,
        UNIT=unit, PER_ROW=out.shape[1] // BLOCK, NESTED=NESTED_BLOCK, BLOCKS=BLOCKS,
        num_warps=launching.warps_for(BLOCKS * BLOCK, 32), enable_fp_fusion=False,
    )  # fmt: skip
    return True
