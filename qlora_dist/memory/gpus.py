"""GPUs by name, and a rough speed: FLOPs over the rate that the GPU reaches in practice, labeled as an estimate."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..config import RunConfig
from ..errors import UserError
from ..files import GIB, MIB
from .plan import MemoryPlan
from .shapes import ModelShapes


@dataclass(frozen=True)
class Gpu:
    """The memory and speed of a GPU."""

    name: str
    device_bytes: int  # torch.cuda.get_device_properties(0).total_memory
    peak_flops: float = 0.0  # dense bf16 with fp32 accumulation; 0: unknown
    memory_rate: float = 0.0  # bytes per second
    efficiency: float = 0.0  # fraction of peak_flops reached in adapter training, counting recomputation
    has_bfloat16: bool = True  # compute capability 8.0 and above


# Memory: as nvidia-smi and torch report it, not the round number in the name. Efficiencies: published adapter training,
# counting recomputation: 0.50 on A100 and 0.70 on RTX 4090 (torchtune), 0.41 on H100 (NeMo); GPUs without a published
# value use their generation's, slightly reduced
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 40_354 * MIB, 312e12, 1.55e12, 0.50),
        Gpu("a100-80", 81_153 * MIB, 312e12, 2.0e12, 0.50),
        Gpu("h100", 81_079 * MIB, 989e12, 3.35e12, 0.40),
        Gpu("h200", 143_156 * MIB, 989e12, 4.8e12, 0.40),
        Gpu("b200", 182_642 * MIB, 2250e12, 8.0e12, 0.35),
        Gpu("a6000", 48_681 * MIB, 155e12, 0.77e12, 0.50),
        Gpu("a40", 45_634 * MIB, 150e12, 0.70e12, 0.50),
        Gpu("a10g", 22_731 * MIB, 70e12, 0.60e12, 0.50),
        Gpu("l4", 22_692 * MIB, 121e12, 0.30e12, 0.45),
        Gpu("l40s", 45_487 * MIB, 362e12, 0.86e12, 0.45),
        Gpu("rtx3090", 24_268 * MIB, 71e12, 0.94e12, 0.60),
        Gpu("rtx4090", 24_217 * MIB, 165e12, 1.01e12, 0.65),
        Gpu("rtx5090", 32_120 * MIB, 210e12, 1.79e12, 0.60),
        Gpu("rtx6000ada", 48_531 * MIB, 364e12, 0.96e12, 0.45),
        Gpu("v100-32", 32_494 * MIB, has_bfloat16=False),
        Gpu("t4", 14_918 * MIB, has_bfloat16=False),
    )
}
_ALIASES = {"a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090", "5090": "rtx5090", "v100": "v100-32"}
DEQUANT_EFFICIENCY = 0.5  # fraction of the memory rate reached by bitsandbytes' kernels


def without_bfloat16(name: str) -> str:
    """What to know of a GPU that is older than bfloat16, before training in it there."""
    return (
        f"{name} computes no bfloat16: torch emulates it, and kernels of this package may not start there. Set "
        "model.compute_dtype=float32, which it computes, in more memory; float16 is not supported, as its gradients "
        "underflow"
    )


def parse_gpu(text: str) -> Gpu:
    """A name in GPUS, or an amount of memory such as 48GiB or 24GB. Raises UserError."""
    name = text.strip().lower()
    name = _ALIASES.get(name, name)
    if name in GPUS:
        return GPUS[name]
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb|mib|mb)", name)
    if amount is None:
        raise UserError(f"--gpu {text!r}: expected an amount such as 48GiB, or one of {', '.join(GPUS)}")
    unit = {"gib": GIB, "mib": MIB, "gb": 10**9, "mb": 10**6}[amount[2]]
    return Gpu(text.strip(), int(float(amount[1]) * unit))


@dataclass(frozen=True)
class Speed:
    """An estimate of tokens per second, and its assumptions."""

    tokens_per_second: float
    assumptions: str


def estimate_speed(config: RunConfig, shapes: ModelShapes, plan: MemoryPlan, gpu: Gpu) -> Speed | None:
    """Tokens per second over all ranks. None for a GPU of unknown speed.

    FLOPs per token: 2 per weight forward, 2 for the gradient of the input (and 2 for the gradient of a trained weight),
    2 more if the layer is recomputed; attention over half a row forward, 2.5 times that backward; the head twice.
    Dequantization once per pass and micro-batch, at half the memory rate.
    """
    if not gpu.peak_flops:
        return None
    recomputed = plan.recompute / plan.num_layers
    trains_all = config.lora is None
    adapters = 0 if trains_all else plan.trainable_parameters
    linear = shapes.active_weights * (4 + 2 * recomputed + (2 if trains_all else 0)) + adapters * (6 + 2 * recomputed)
    width = shapes.num_heads * shapes.head_dim
    attention = 2 * shapes.num_layers * width * plan.row_tokens * (3.5 + recomputed)
    head = 4 * shapes.vocabulary * shapes.hidden * (1.5 if trains_all else 1)
    seconds = (linear + attention + head) / (gpu.peak_flops * gpu.efficiency)
    if config.model.quantization != "none":
        quantized = shapes.linear_weights + shapes.expert_weights
        moved = quantized * 2.5 * (2 + recomputed)  # reads half a byte and constants, writes two bytes
        seconds += moved / (gpu.memory_rate * DEQUANT_EFFICIENCY) / (plan.micro_rows * plan.row_tokens)
    return Speed(
        plan.world_size / seconds,
        f"estimate: {gpu.peak_flops / 1e12:.0f} TFLOP/s x {gpu.efficiency:.0%}, full rows of one document, no waiting "
        "for data or other ranks",
    )
