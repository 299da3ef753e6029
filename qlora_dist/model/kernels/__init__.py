"""Memory-bound parts of a decoder layer as single operations: Triton on a GPU, plain PyTorch elsewhere."""

from .adapters import write_a, write_b
from .dequantize import dequantize_4bit
from .gradients import raised_products, sum_parts, swiglu_backward_products
from .lower import copy_lower, norm_lower, swiglu_lower
from .norm import rms_norm, rms_norm_backward
from .rotary import rotate_heads, rotate_heads_backward
from .swiglu import swiglu, swiglu_backward

__all__ = [
    "copy_lower",
    "dequantize_4bit",
    "norm_lower",
    "raised_products",
    "rms_norm",
    "rms_norm_backward",
    "rotate_heads",
    "rotate_heads_backward",
    "sum_parts",
    "swiglu",
    "swiglu_backward",
    "swiglu_backward_products",
    "swiglu_lower",
    "write_a",
    "write_b",
]
