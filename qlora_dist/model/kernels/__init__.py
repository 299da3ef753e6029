"""Memory-bound parts of a decoder layer as single operations: Triton on a GPU, plain PyTorch elsewhere."""

from .adapters import write_a, write_b
from .dequantize import dequantize_4bit
from .norm import rms_norm, rms_norm_backward
from .rotary import rotate_heads, rotate_heads_backward
from .swiglu import swiglu, swiglu_backward

__all__ = [
    "dequantize_4bit",
    "rms_norm",
    "rms_norm_backward",
    "rotate_heads",
    "rotate_heads_backward",
    "swiglu",
    "swiglu_backward",
    "write_a",
    "write_b",
]
