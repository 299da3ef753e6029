"""How linear layers that share their input are multiplied as one: known to the model and to its memory plan."""

from __future__ import annotations

from collections.abc import Sequence

COLUMNS = 16  # adapters' columns are rounded up to this: rows stay aligned to 32 bytes
LARGEST_MATRIX = 2**27  # weights dequantized at a time, unless one layer has more: bounds the memory of a product

# The gradient of SwiGLU with products of its adapters (model.kernels.gradients): in parts that programs sum alone
ROWS_OF_STEP = 32  # tokens that a program takes at a time
COLUMNS_OF_PART = 256
LEAST_PROGRAMS = 256  # so that every multiprocessor has work
COLUMNS_OF_RAISED = 512  # G' and dB of other layers (`raised_products`) read less: wider parts, fewer sums
LEAST_RAISED_PROGRAMS = 128
TOKENS_OF_CALL = 8192  # parts of more tokens would take more memory than a dequantized matrix
LARGEST_JOINT_RANK = 32  # sums of larger ranks do not fit in registers
LARGEST_LOWERED = 64  # adapters' columns that `model.kernels.lower` computes with their input

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


def num_parts(tokens: int, width: int) -> tuple[int, int]:
    """Parts of the columns, and of the tokens. They depend on nothing else, so that results do not either."""
    columns = -(-width // COLUMNS_OF_PART)
    return columns, _num_token_parts(tokens, columns, LEAST_PROGRAMS)


def num_raised(tokens: int, outputs: Sequence[int]) -> tuple[int, int]:
    """The same for `raised_products` of layers with so many outputs: no part has columns of two layers."""
    columns = sum(-(-width // COLUMNS_OF_RAISED) for width in outputs)
    return columns, _num_token_parts(tokens, columns, LEAST_RAISED_PROGRAMS)


def _num_token_parts(tokens: int, columns: int, least_programs: int) -> int:
    blocks = max(1, -(-tokens // ROWS_OF_STEP))
    steps = -(-blocks // min(blocks, -(-least_programs // columns)))
    return -(-blocks // steps)
