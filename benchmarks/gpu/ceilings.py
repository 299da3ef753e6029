"""What the device can do, alone and in the shapes of the models: the denominators of every other figure.

    python -m benchmarks.gpu.ceilings --out OUT/ceilings.json [--tiny]

GEMM at several numbers of tokens x real shapes, plain and with 64 more columns of K (room for adapters), copy
bandwidth, pinned transfers, bitsandbytes' dequantization, attention forward and backward, launch overhead. Operands
are random: zeros draw less power and run faster. Runs on a CPU at tiny sizes too (--tiny).
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qlora_dist.errors import UserError

from .. import provenance
from ..shapes import SHAPES


def seconds_of(work: Callable[[], Any], device: torch.device, at_least: float) -> list[float]:
    """Seconds of single calls, after a warm-up, over at least `at_least` seconds and three calls."""
    for _ in range(3):
        work()
    _sync(device)
    samples: list[float] = []
    ends = time.perf_counter() + at_least
    while len(samples) < 3 or (time.perf_counter() < ends and len(samples) < 2000):
        if device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            work()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last) / 1000)
        else:
            started = time.perf_counter()
            work()
            samples.append(time.perf_counter() - started)
    return samples


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ceilings:
    """Collects results; a case that fails is written down with its reason."""

    def __init__(self, device: torch.device, is_tiny: bool) -> None:
        self.device, self.is_tiny = device, is_tiny
        self.at_least = 0.02 if is_tiny else 1.0
        self.results: list[dict[str, Any]] = []

    def measure(self, what: str, case: str, unit: str, amount: float, work: Callable[[], Any]) -> None:
        """value = amount / median seconds, in `unit`."""
        try:
            samples = seconds_of(work, self.device, self.at_least)
        except Exception as error:  # a kernel that is not there must not end the others
            text = f"{type(error).__name__}: {error}"[:300]
            self.results.append({"what": what, "case": case, "value": None, "unit": unit, "reason": text})
            return
        value = amount / statistics.median(samples)
        self.results.append({"what": what, "case": case, "value": value, "unit": unit, "samples_seconds": samples})
        print(f"{what} {case}: {value:,.2f} {unit}", flush=True)

    def gemm(self) -> None:
        names = ("tiny",) if self.is_tiny else ("8b", "13b", "70b")
        tokens = (16, 32) if self.is_tiny else (2048, 8192, 16384)
        for name in names:
            sizes = sorted(set(SHAPES[name].matrices().values()))
            for count in tokens:
                for outputs, inputs in sizes:
                    for extra in (0, 64):
                        x, w = self._random(count, inputs + extra), self._random(outputs, inputs + extra)
                        flops = 2 * count * outputs * (inputs + extra)
                        case = f"{count} x {outputs} x {inputs}" + (f" + {extra}" if extra else "")
                        self.measure("gemm bf16", case, "TFLOP/s", flops / 1e12, lambda x=x, w=w: F.linear(x, w))

    def bandwidth(self) -> None:
        count = 1 << (20 if self.is_tiny else 31)
        source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.measure("copy", f"{count >> 20} MiB, read + write", "GB/s", 2 * count / 1e9, lambda: target.copy_(source))
        if self.device.type != "cuda":
            return
        host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        part = source[: 1 << 30]
        gigabytes = (1 << 30) / 1e9
        self.measure("pinned", "host to device", "GB/s", gigabytes, lambda: part.copy_(host, non_blocking=True))
        self.measure("pinned", "device to host", "GB/s", gigabytes, lambda: host.copy_(part, non_blocking=True))

    def dequantization(self) -> None:
        """Bytes read and written by one nf4 weight: 0.5 code, its constants, 2 result."""
        import bitsandbytes.functional as bnb

        shapes = ((128, 128),) if self.is_tiny else ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))
        for shape in shapes:
            for is_double in (False, True):
                weight = self._random(*shape)
                packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=is_double)
                constants = 1 / 64 + 4 / 16384 if is_double else 4 / 64
                moved = weight.numel() * (0.5 + constants + 2)
                case = f"{shape[0]} x {shape[1]}" + (", double" if is_double else "")
                self.measure("dequantize nf4", case, "GB/s", moved / 1e9,
                             lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state))  # fmt: skip

    def attention(self) -> None:
        lengths = (32,) if self.is_tiny else (2048, 4096)
        heads, kv_heads, width = (4, 2, 16) if self.is_tiny else (32, 8, 128)
        for length in lengths:
            tokens = length if self.is_tiny else 8192
            count = tokens // length
            query = self._random(count, heads, length, width).requires_grad_()
            key, value = (self._random(count, kv_heads, length, width).requires_grad_() for _ in range(2))
            forward = 4 * count * heads * width * length * (length + 1) / 2

            def sdpa(query: Any = query, key: Any = key, value: Any = value) -> Any:
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

            case = f"{count} x {length}, {heads}/{kv_heads} heads of {width}"
            self._both("attention sdpa", case, forward, sdpa)
            self._both("attention varlen", case, forward, _varlen(query, key, value, length))
            self._both("attention flash-attn", case, forward, _flash(query, key, value, length))

    def _both(self, what: str, case: str, forward: float, attend: Callable[[], Any]) -> None:
        self.measure(f"{what} forward", case, "TFLOP/s", forward / 1e12, attend)

        def there_and_back() -> None:
            result = attend()
            result = result[0] if isinstance(result, tuple) else result
            result.backward(torch.ones_like(result))

        self.measure(f"{what} forward + backward", case, "TFLOP/s", 3.5 * forward / 1e12, there_and_back)

    def launches(self) -> None:
        """Launches a second from the host, and of a CUDA graph's replay."""
        x = torch.zeros(1, device=self.device)
        number = 20 if self.is_tiny else 1000

        def many() -> None:
            for _ in range(number):
                x.add_(1)

        self.measure("launch", f"{number} small kernels", "kernels/s", number, many)
        if self.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                many()
            self.measure("launch", f"a graph of {number}", "kernels/s", number, graph.replay)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).bfloat16()


def _varlen(query: Any, key: Any, value: Any, length: int) -> Callable[[], Any]:
    """torch's varlen attention on the same documents, flattened."""
    q, k, v, borders = _flattened(query, key, value, length)

    def attend() -> Any:
        from torch.nn.attention import varlen

        repeat = q.shape[1] // k.shape[1]  # not every version takes grouped heads
        keywords = inspect.signature(varlen.varlen_attn).parameters  # nor the same word for causal
        causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in keywords else {"is_causal": True}
        k2, v2 = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return varlen.varlen_attn(q, k2, v2, borders, borders, length, length, **causal)

    return attend


def _flash(query: Any, key: Any, value: Any, length: int) -> Callable[[], Any]:
    q, k, v, borders = _flattened(query, key, value, length)

    def attend() -> Any:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, borders, borders, length, length, causal=True)

    return attend


def _flattened(query: Any, key: Any, value: Any, length: int) -> tuple[Any, Any, Any, torch.Tensor]:
    flat = [t.detach().transpose(1, 2).flatten(0, 1).contiguous().requires_grad_() for t in (query, key, value)]
    borders = torch.arange(0, len(flat[0]) + 1, length, dtype=torch.int32, device=query.device)
    return flat[0], flat[1], flat[2], borders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        provenance.require_clean(arguments.allow_dirty)
        if device.type == "cpu" and not arguments.tiny:
            raise UserError("no CUDA device: give --tiny to try the script on a CPU")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    origin = provenance.collect(provenance.this_command("benchmarks.gpu.ceilings"), device)
    ceilings = Ceilings(device, arguments.tiny)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    parts = ("gemm", "bandwidth", "dequantization", "attention", "launches")
    for part in parts:
        try:
            getattr(ceilings, part)()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:300]
            ceilings.results.append({"what": part, "case": "", "value": None, "unit": "", "reason": text})
        content = {"benchmark": "ceilings", "provenance": origin, "results": ceilings.results}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")  # after each part: a time limit keeps the rest


if __name__ == "__main__":
    main()
