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

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...config import RunConfig
from ...errors import UserError
from ...memory import MemoryPlan
from .launches import Call, Kernel, kernels_of
from .live_bytes import LiveBytes
from .simulate import create_tables, fill_resident, forward, full_rows, meta_model

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


# Each a data sheet's peak times an assumed share; a measurement replaces it (`changed`)
RATES = {
    # 989 TFLOP/s in bf16 x 0.71: large products run into the power limit. fp32 without tensor cores: 67 x 0.75.
    # Flash attention 2 (torch's) was written for Ampere and uses about 0.38 of Hopper; backward 0.3: five products
    # instead of two, and atomic sums. 3.35 TB/s x 0.78, as a large copy.
    "h100": Rates(700e12, 50e12, 380e12, 300e12, 2.6e12),
    # The same chip with 4.8 TB/s
    "h200": Rates(700e12, 50e12, 380e12, 300e12, 3.75e12),
    # 80 GB. 312 TFLOP/s x 0.8 (no power limit in the way), 19.5 x 0.77, attention 0.6 and 0.5, 2.0 TB/s x 0.8
    "a100": Rates(250e12, 15e12, 190e12, 160e12, 1.6e12),
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


def trace_micro_step(config: RunConfig, plan: MemoryPlan, pretrained: Any, rates: Rates) -> Roofline:
    """Forward, loss and backward of one micro-batch of full rows, a document each; no update.

    Two things differ from a GPU: the head's logits are cast to fp32 by a kernel of their own, not by the product; and
    the host is never the bound. `pretrained` is transformers' config. Raises UserError for what cannot be simulated.
    """
    create_tables(config.model.quantization)
    model = meta_model(config, plan, pretrained)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        head, _ = fill_resident(config, model, live)
        batch = full_rows(plan.micro_rows, plan.row_tokens, live)
        with Roofline(rates, batch.lengths) as roofline:
            forward(config, model, head, batch, live).backward()
    return roofline
