"""4-bit codes -> the matrix, bit for bit as bitsandbytes dequantizes it, in one pass into rows of a wider buffer.

    constant of a block = absmax, or with double quantization (Dettmers et al. 2023, sec. 3)
                          nested_code[absmax] * nested_absmax[block // 256] + offset
    weight              = code[4 bits] * constant

Legend: N outputs, K inputs of a layer, B = N K / 64 blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config.quantization import BLOCK, NESTED_BLOCK
from .registry import register


def _dequantize_4bit(
    codes: Tensor,
    code: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
) -> None:
    constants = absmax
    if nested_absmax is not None and nested_code is not None and nested_offset is not None:
        repeated = nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        constants = nested_code[absmax.long()] * repeated + nested_offset
    pairs = codes.view(-1).view(torch.uint8)
    both = torch.stack([pairs >> 4, pairs & 15], dim=-1).view(-1)[: out.numel()]
    values = code[both.long()] * constants.repeat_interleave(BLOCK)[: out.numel()]
    out.copy_(values.view(out.shape))


# codes (N K / 2,) of any type and shape: the first weight is in the high bits. code (16,) fp32. absmax (B,) fp32, or
# uint8 with nested_absmax (B / 256,) fp32, nested_code (256,) fp32 and nested_offset () fp32. out (N, K), rows strided.
dequantize_4bit = register(
    "dequantize_4bit(Tensor codes, Tensor code, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, Tensor(a!) out) -> ()",
    _dequantize_4bit,
    "dequantize_triton",
)
