"""What the device can do on isolated operations in the models' shapes: the denominators of every other result.

    python -m benchmarks.gpu.ceilings --out OUT/ceilings.json [--tiny]

GEMM for several token counts x real shapes, plain and with K extended by 64 columns (for adapters), copy bandwidth,
pinned transfers, bitsandbytes' dequantization, attention forward and backward, launch overhead. Operands are random:
zeros draw less power and run faster. Also runs on a CPU at tiny sizes (--tiny).

About 100 cases of at least `AT_LEAST_SECONDS`: an estimated 90 seconds on an H100, including operands and warm-up.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qlora_dist.errors import UserError

from .. import provenance
from ..shapes import SHAPES
from .timing import num_sets, seconds_of

AT_LEAST_SECONDS = 0.7  # per case
PARTS = ("gemm", "bandwidth", "dequantization", "attention", "launches")


class Ceilings:
    """Collects results; a case that fails is recorded with its reason."""

    def __init__(self, device: torch.device, is_tiny: bool) -> None:
        self.device, self.is_tiny = device, is_tiny
        self.at_least = 0.02 if is_tiny else AT_LEAST_SECONDS
        self.cache_bytes = 0 if is_tiny else cache_bytes(device)
        self.results: list[dict[str, Any]] = []

    def measure(self, what: str, case: str, unit: str, amount: float, works: Sequence[Callable[[], Any]]) -> None:
        """value = amount / median seconds per call, in `unit`. `works`: the call on each set of operands."""
        try:
            samples, calls = seconds_of(works, self.device, self.at_least)
        except Exception as error:  # a missing kernel must not stop the others
            text = f"{type(error).__name__}: {error}"[:300]
            self.results.append({"what": what, "case": case, "value": None, "unit": unit, "reason": text})
            return
        value = amount / statistics.median(samples)
        result = {"what": what, "case": case, "value": value, "unit": unit, "samples_seconds": samples}
        state = provenance.device_state(self.device) or {}  # power and heat set the clock, the clock the value
        names = ("sm_clock_mhz", "memory_clock_mhz", "power_watts", "temperature_celsius")
        clocks = {name: state[name] for name in names if name in state}
        self.results.append(result | {"calls_per_sample": calls, "num_sets": len(works), **clocks})
        print(f"{what} {case}: {value:,.2f} {unit}", flush=True)

    def sets_of(self, make: Callable[[], Callable[[], Any]], set_bytes: float) -> list[Callable[[], Any]]:
        """The call on each of enough operand sets to exceed every cache (`num_sets`)."""
        return [make() for _ in range(num_sets(set_bytes, self.cache_bytes))]

    def gemm(self) -> None:
        names = ("tiny",) if self.is_tiny else ("8b", "13b", "70b")
        tokens = (16, 32) if self.is_tiny else (2048, 8192, 16384)
        for name in names:
            sizes = sorted(set(SHAPES[name].matrices().values()))
            for count in tokens:
                for outputs, inputs in sizes:
                    for extra in (0, 64):
                        case = f"{count} x {outputs} x {inputs}" + (f" + {extra}" if extra else "")
                        self._gemm(case, count, outputs, inputs + extra)

    def _gemm(self, case: str, count: int, outputs: int, inputs: int) -> None:
        def make() -> Callable[[], Any]:
            x, w = self._random(count, inputs), self._random(outputs, inputs)
            return lambda: F.linear(x, w)

        works = self.sets_of(make, 2 * inputs * (count + outputs))
        self.measure("gemm bf16", case, "TFLOP/s", 2 * count * outputs * inputs / 1e12, works)

    def bandwidth(self) -> None:
        """One set each: the copied data is many times larger than any cache."""
        count = 1 << (20 if self.is_tiny else 31)
        source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        case = f"{count >> 20} MiB, read + write"
        self.measure("copy", case, "GB/s", 2 * count / 1e9, [lambda: target.copy_(source)])
        if self.device.type != "cuda":
            return
        part = source[: min(count, 1 << 30)]
        host = torch.empty(len(part), dtype=torch.uint8, pin_memory=True)
        amount = len(part) / 1e9
        self.measure("pinned", "host to device", "GB/s", amount, [lambda: part.copy_(host, non_blocking=True)])
        self.measure("pinned", "device to host", "GB/s", amount, [lambda: host.copy_(part, non_blocking=True)])

    def dequantization(self) -> None:
        """Bytes read and written per nf4 weight: 0.5 for the code, its constants, 2 for the result."""
        import bitsandbytes.functional as bnb

        shapes = ((128, 128),) if self.is_tiny else ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))
        for shape in shapes:
            for is_double in (False, True):
                constants = 1 / 64 + 4 / 16384 if is_double else 4 / 64
                weights = shape[0] * shape[1]

                def make(shape: tuple[int, int] = shape, is_double: bool = is_double) -> Callable[[], Any]:
                    packed, state = bnb.quantize_4bit(
                        self._random(*shape), quant_type="nf4", compress_statistics=is_double
                    )
                    return lambda: bnb.dequantize_4bit(packed, state)

                case = f"{shape[0]} x {shape[1]}" + (", double" if is_double else "")
                works = self.sets_of(make, weights * (0.5 + constants))  # only reads: results rotate with the calls
                self.measure("dequantize nf4", case, "GB/s", weights * (0.5 + constants + 2) / 1e9, works)

    def attention(self) -> None:
        """The same documents in every kernel. On a GPU `sdpa` is torch's choice, which on Hopper prefers cuDNN to flash
        attention: peers without flash-attn use it."""
        lengths = (32,) if self.is_tiny else (2048, 4096)
        heads, kv_heads, width = (4, 2, 16) if self.is_tiny else (32, 8, 128)
        for length in lengths:
            count = 1 if self.is_tiny else 8192 // length
            forward = 4 * count * heads * width * length * (length + 1) / 2
            case = f"{count} x {length}, {heads}/{kv_heads} heads of {width}"
            set_bytes = 2 * count * length * width * (heads + 2 * kv_heads)
            operands = [
                [self._random(count, n, length, width) for n in (heads, kv_heads, kv_heads)]
                for _ in range(num_sets(set_bytes, self.cache_bytes))
            ]
            for name, attend in attentions(self.device, length, count).items():
                self._both(f"attention {name}", case, forward, attend, operands)

    def _both(self, what: str, case: str, forward: float, attend: Callable[..., Any], operands: list[Any]) -> None:
        """Forward alone, and forward with backward: 5 products more than its 2, so 3.5 times the work."""
        is_flat = "varlen" in what or "flash-attn" in what
        sets = [[_flattened(t) if is_flat else t for t in tensors] for tensors in operands]
        sets = [[t.detach().requires_grad_() for t in tensors] for tensors in sets]
        upstream = torch.randn_like(sets[0][0])

        def forward_only(inputs: list[torch.Tensor]) -> Callable[[], Any]:
            return lambda: attend(*inputs)

        def forward_backward(inputs: list[torch.Tensor]) -> Callable[[], Any]:
            # gradients are returned, not accumulated: the addition is not part of attention
            return lambda: torch.autograd.grad(attend(*inputs), inputs, upstream)

        self.measure(f"{what} forward", case, "TFLOP/s", forward / 1e12, [forward_only(one) for one in sets])
        works = [forward_backward(one) for one in sets]
        self.measure(f"{what} forward + backward", case, "TFLOP/s", 3.5 * forward / 1e12, works)

    def launches(self) -> None:
        """Launches per second from the host, and in the replay of a CUDA graph."""
        x = torch.zeros(1, device=self.device)
        number = 20 if self.is_tiny else 1000

        def many() -> None:
            for _ in range(number):
                x.add_(1)

        self.measure("launch", f"{number} small kernels", "kernels/s", number, [many])
        if self.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                many()
            self.measure("launch", f"a graph of {number}", "kernels/s", number, [graph.replay])

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)


def attentions(device: torch.device, length: int, count: int) -> dict[str, Callable[..., Any]]:
    """Kernels by name, for `count` documents of `length` tokens: sdpa accepts (documents, heads, tokens, width), varlen
    and flash-attn (all tokens, heads, width)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    boundaries = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)

    def sdpa(query: Any, key: Any, value: Any) -> Any:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def forced(backend: Any) -> Callable[..., Any]:
        def attend(query: Any, key: Any, value: Any) -> Any:
            with sdpa_kernel(backend):
                return sdpa(query, key, value)

        return attend

    def varlen(query: Any, key: Any, value: Any) -> Any:
        from torch.nn.attention import varlen as module

        return module.varlen_attn(query, key, value, boundaries, boundaries, length, length, **varlen_keywords())

    def flash(query: Any, key: Any, value: Any) -> Any:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(query, key, value, boundaries, boundaries, length, length, causal=True)

    gpu_only = {"sdpa flash": forced(SDPBackend.FLASH_ATTENTION), "sdpa cudnn": forced(SDPBackend.CUDNN_ATTENTION)}
    return {"sdpa": sdpa, **(gpu_only if device.type == "cuda" else {}), "varlen": varlen, "flash-attn": flash}


def varlen_keywords() -> dict[str, Any]:
    """Keywords for causal attention with grouped heads in the installed torch. Before 2.12 it accepts grouped heads
    without the keyword."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def cache_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache; 0 on a CPU, where the script is only tried out."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def _flattened(tensor: torch.Tensor) -> torch.Tensor:
    """(documents, heads, tokens, width) -> (all tokens, heads, width)."""
    return tensor.transpose(1, 2).flatten(0, 1).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for tests")
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        provenance.require_clean(arguments.allow_dirty)
        if device.type == "cpu" and not arguments.tiny:
            raise UserError("there is no CUDA device; give --tiny to try the script on a CPU")
        origin = provenance.collect(provenance.this_command("benchmarks.gpu.ceilings"), device)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    before = provenance.device_state(device)
    ceilings = Ceilings(device, arguments.tiny)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    for part in PARTS:
        started = time.perf_counter()
        try:
            getattr(ceilings, part)()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:300]
            ceilings.results.append({"what": part, "case": "", "value": None, "unit": "", "reason": text})
        seconds[part] = round(time.perf_counter() - started, 1)
        content = {
            "benchmark": "ceilings",
            "provenance": origin,
            "device_state": {"before": before, "after": provenance.device_state(device)},
            "l2_cache_bytes": cache_bytes(device),
            "part_seconds": seconds,
            "results": ceilings.results,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")  # after each part: a time limit keeps it


if __name__ == "__main__":
    main()
