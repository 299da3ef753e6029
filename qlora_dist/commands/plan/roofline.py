"""Predicted time of a training micro-step: its operations under fake tensors, each at the roofline of a card.

    kernel      max(FLOPs / sustained rate, bytes / sustained bandwidth, launch floor)
    micro-step  the sum over its kernels: the GPU is never idle, and no two kernels overlap

`Roofline` sees every operation that reaches the dispatcher, so what is summed is what the real training code does;
`launches` knows which kernels an operation is. The host's time, the allocator and communication are not in it. The
ratio of two such sums is worth more than either of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ...config import RunConfig
from ...errors import UserError
from ...memory import MemoryPlan
from ...memory.gpus import Gpu
from .launches import KINDS, Call, Kernel, kernels_of
from .simulate import Trace, simulate

# --- what a card sustains ---------------------------------------------------------------------------------------------

# Assumed, not measured by this project: from one small kernel's start to the next one's in a stream that never waits.
LAUNCH_SECONDS = 2e-6
# Assumed: bitsandbytes' kernels against a copy. On an H100 1.56 TB/s, near half of the data sheet's (`memory.gpus`).
DEQUANTIZATION_SHARE = 0.6


@dataclass(frozen=True)
class Rates:
    """Sustained rates of a card: assumptions, below the data sheet by what large kernels are known to lose."""

    product_flops: float  # 16-bit products of matrices of thousands of rows, per second
    wide_product_flops: float  # fp32 products; torch does not use TF32 unless it is told to
    attention_flops: float  # flash attention, forward
    attention_backward_flops: float
    bandwidth: float  # bytes per second, read and written, of a large copy
    launch_seconds: float = LAUNCH_SECONDS
    dequantization_share: float = DEQUANTIZATION_SHARE  # of the bandwidth, by bitsandbytes' kernels

    @property
    def dequantization_bandwidth(self) -> float:
        return self.bandwidth * self.dequantization_share

    def seconds(self, kernel: Kernel) -> float:
        """The roofline: what bounds this kernel."""
        computing = kernel.flops / float(getattr(self, kernel.compute))
        moving = kernel.num_bytes / float(getattr(self, kernel.memory))
        return max(computing, moving, self.launch_seconds)

    def changed(self, name: str, value: float) -> Rates:
        """With one rate replaced. Raises UserError for a name that is none, or a value that is not positive."""
        names = list(self.__dataclass_fields__)
        if name not in names:
            raise UserError(f"there is no rate {name!r}; expected one of {', '.join(names)}")
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"rate {name} is {value}; expected a positive number")
        return Rates(**{**{one: getattr(self, one) for one in names}, name: value})


def rates_of(gpu: Gpu) -> Rates | None:
    """Of a card without rates of its own: shares of its data sheet that large kernels reach on the others. None where
    its data are not known."""
    if gpu.name in RATES or not gpu.peak_flops:
        return RATES.get(gpu.name)
    peak = gpu.peak_flops
    return Rates(0.75 * peak, peak / 16, 0.5 * peak, 0.4 * peak, 0.8 * gpu.memory_rate)


# Each a data sheet's peak times an assumed share; a measurement replaces it (`changed`)
RATES = {
    # 989 TFLOP/s in bf16 x 0.71: large products run into the power limit. fp32 without tensor cores: 67 x 0.75.
    # Flash attention 2 (torch's) was written for Ampere and uses about 0.38 of Hopper; backward 0.3: five products
    # instead of two, and atomic sums. 3.35 TB/s x 0.78, as a large copy.
    "h100": Rates(700e12, 50e12, 380e12, 300e12, 2.6e12),
    # The same chip with 4.8 TB/s
    "h200": Rates(700e12, 50e12, 380e12, 300e12, 3.75e12),
    # 80 GB. 312 TFLOP/s x 0.8 (no power limit in the way), 19.5 x 0.77, attention 0.6 and 0.5, 2.0 TB/s x 0.8
    "a100-80": Rates(250e12, 15e12, 190e12, 160e12, 1.6e12),
}


# --- tracing ----------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Totals over kernels."""

    kernels: int = 0
    flops: float = 0.0
    num_bytes: float = 0.0
    seconds: float = 0.0

    def add(self, other: Sums) -> None:
        self.kernels += other.kernels
        self.flops += other.flops
        self.num_bytes += other.num_bytes
        self.seconds += other.seconds


class Roofline(TorchDispatchMode):
    """Sums the kernels of every operation within it. `lengths` are those of the documents that attention sees."""

    def __init__(self, rates: Rates, lengths: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.rates = rates
        self.lengths = lengths
        self.operations: dict[tuple[str, str], Sums] = {}  # by kind and operation

    def total(self, kind: str | None = None) -> Sums:
        """Over all operations, or those kernels of theirs that are of one kind."""
        found = Sums()
        for (this, _), sums in self.operations.items():
            if kind in (None, this):
                found.add(sums)
        return found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = f"{function.namespace}.{function._schema.name.partition('::')[2]}"
        for kernel in kernels_of(Call(name, args, kwargs, result, function, self.lengths)):
            sums = self.operations.setdefault((kernel.kind, name), Sums())
            sums.add(Sums(1, kernel.flops, kernel.num_bytes, self.rates.seconds(kernel)))
        return result


def trace_micro_step(config: RunConfig, plan: MemoryPlan, pretrained: Any, rates: Rates) -> tuple[Roofline, Trace]:
    """Forward, loss and backward of one micro-batch of full rows, a document each, without the update; and what its
    step takes of memory.

    Two things differ from a GPU: the head's logits are cast to fp32 by a kernel of their own, not by the product; and
    the host is never the bound. `pretrained` is transformers' config. Raises UserError for what cannot be simulated.
    """
    roofline = Roofline(rates, (plan.row_tokens,) * plan.micro_rows)
    return roofline, simulate(config, plan, pretrained, watching=roofline)


# --- what a run is predicted to do ------------------------------------------------------------------------------------

# Of Python and the dispatcher for each launch: this package's steps of 849 to 2,129 launches took 42 to 53 microseconds
# for each on the null device, on one core of a server (benchmarks/results/null/host.json)
HOST_SECONDS = 45e-6
# AdamW reads weight, gradient and two states, and writes all but the gradient, in fp32; 8-bit states take a byte each
UPDATE_BYTES = {False: 28.0, True: 16.0}


@dataclass(frozen=True)
class Prediction:
    """The speed of full rows, predicted from a trace: no waiting for data, other ranks, or memory that is paged."""

    seconds_by_kind: dict[str, float]  # of a micro-step on the device
    host_seconds: float  # of the same, on the host
    update_seconds: float  # once a step
    seconds: float  # of a step of `micro_steps`: the larger of device and host, and the update
    micro_steps: int
    kernels: int  # of a micro-step
    tokens_per_second: float  # over all ranks
    share_of_peak: float  # FLOPs of products and attention, recomputed ones too, over seconds and the card's peak

    @property
    def is_host_bound(self) -> bool:
        return self.host_seconds > sum(self.seconds_by_kind.values())


def predict(config: RunConfig, plan: MemoryPlan, roofline: Roofline, gpu: Gpu) -> Prediction:
    """The speed of a run on `plan.world_size` of these GPUs, from the trace of its micro-step."""
    by_kind = {kind: roofline.total(kind).seconds for kind in KINDS}
    whole = roofline.total()
    host = whole.kernels * HOST_SECONDS
    moved = plan.trainable_parameters * UPDATE_BYTES["8bit" in config.optim.name]
    update = moved / roofline.rates.bandwidth
    micro_steps = max(1, config.batch.rows_per_step // (plan.micro_rows * plan.world_size))
    seconds = micro_steps * max(whole.seconds, host) + update
    tokens = micro_steps * plan.micro_rows * plan.row_tokens
    return Prediction(
        by_kind, host, update, seconds, micro_steps, whole.kernels,
        tokens_per_second=plan.world_size * tokens / seconds,
        share_of_peak=micro_steps * whole.flops / seconds / gpu.peak_flops,
    )  # fmt: skip
