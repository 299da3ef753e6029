"""How linear layers that share their input are multiplied as one: known to the model and to its memory plan."""

from __future__ import annotations

from collections.abc import Sequence

COLUMNS = 16  # adapters' columns are rounded up to this: rows stay aligned to 32 bytes
LARGEST_MATRIX = 2**27  # weights dequantized at a time, unless one layer has more: bounds the memory of a product

# model_type of the families whose layers can be computed as one block (`model.decoder_block`)
BLOCK_FAMILIES = ("granite", "llama", "mistral", "qwen2", "qwen3", "smollm3")


def padded_columns(ranks: Sequence[int]) -> int:
    """Columns that the adapters of one product take."""
    return -(-sum(ranks) // COLUMNS) * COLUMNS


def split_product(outputs: Sequence[int], inputs: int) -> list[tuple[int, int]]:
    """Ranges (start, stop) of layers whose matrices are dequantized together, from the outputs of each layer."""
    parts = [(0, 1)]
    size = outputs[0]
    for index, width in enumerate(outputs[1:], 1):
        size += width
        if size * inputs <= LARGEST_MATRIX:
            parts[-1] = (parts[-1][0], index + 1)
        else:
            parts.append((index, index + 1))
            size = width
    return parts
