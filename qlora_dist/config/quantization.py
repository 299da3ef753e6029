"""Sizes of quantized matrices. Does not import torch, since the memory plan uses it too."""

from __future__ import annotations

from typing import Literal, NamedTuple

Quantization = Literal["nf4", "fp4", "int8", "none"]

BLOCK = 64  # weights that share one 4-bit quantization constant
NESTED_BLOCK = 256  # constants that share one constant of the second quantization (QLoRA, section 3)


class QuantizedBytes(NamedTuple):
    """Bytes of a quantized matrix, without its table of code values (1 KiB per matrix)."""

    codes: int
    constants: int  # of the first level
    nested: int  # of the second level

    @property
    def total(self) -> int:
        return sum(self)


def quantized_bytes(num_weights: int, outputs: int, quantization: Quantization, double_quant: bool) -> QuantizedBytes:
    """Bytes of a matrix with this many rows (`outputs`): int8 stores one fp32 scale per row, 4 bit one constant per
    block of weights, which takes one byte with `double_quant`."""
    if quantization == "int8":
        return QuantizedBytes(num_weights, 4 * outputs, 0)
    blocks = -(-num_weights // BLOCK)
    nested = 4 * -(-blocks // NESTED_BLOCK) if double_quant else 0
    return QuantizedBytes(-(-num_weights // 2), blocks if double_quant else 4 * blocks, nested)
