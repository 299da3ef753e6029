"""Each operation of qlora_dist.model.kernels on a GPU: the Triton kernel, its plain reference, and Liger's kernel.

    python -m benchmarks.kernels --out OUT/kernels.json [--shapes 8b 70b] [--tokens 8192]

Bytes per second by what a call must move (qlora_dist.model.kernels.traffic), and their share of the bandwidth of a copy
measured in the same run. Operands cycle through more than the L2 cache holds. Liger (liger-kernel, if installed) has
RMSNorm, RoPE and SwiGLU. Its calls move other bytes than ours (it saves statistics; its gradient of SwiGLU does not
leave the result), so only its seconds are recorded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_dist.errors import UserError

from . import provenance
from .gpu.timing import num_sets, seconds_of
from .kernel_cases import EPS, NAMES, operands, reference_of
from .shapes import SHAPES, Shape

AT_LEAST_SECONDS = 0.3  # per case
COPY_BYTES = 1 << 30


class Comparison:
    """Collects results; a case that fails is recorded with its reason."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self.copy_bytes_per_second = 0.0
        self.results: list[dict[str, Any]] = []

    def measure_copy(self) -> None:
        """The bandwidth that a share of 1 stands for."""
        source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        samples, _ = seconds_of([lambda: target.copy_(source)], self.device, AT_LEAST_SECONDS)
        self.copy_bytes_per_second = 2 * COPY_BYTES / statistics.median(samples)

    def measure(
        self, name: str, by: str, shape: str, moved: int | None, make: Callable[[], Callable[[], Any]], set_bytes: int
    ) -> None:
        """`make`: the call on a new set of operands. `moved`: bytes of a call, None if they are not known."""
        entry: dict[str, Any] = {"operation": name, "by": by, "shape": shape, "bytes": moved}
        try:
            works = [make() for _ in range(num_sets(set_bytes, self.cache_bytes))]
            samples, calls = seconds_of(works, self.device, AT_LEAST_SECONDS)
        except Exception as error:  # a missing kernel must not stop the others
            self.results.append(entry | {"seconds": None, "reason": f"{type(error).__name__}: {error}"[:300]})
            print(f"{shape} {name} by {by}: {self.results[-1]['reason']}", flush=True)
            return
        seconds = statistics.median(samples)
        entry |= {"seconds": seconds, "samples_seconds": samples, "calls_per_sample": calls, "num_sets": len(works)}
        if moved is not None:
            entry |= {"bytes_per_second": moved / seconds}
            entry |= {"share_of_copy": moved / seconds / self.copy_bytes_per_second}
        self.results.append(entry)
        share = f", {entry['share_of_copy']:.0%} of a copy's bandwidth" if moved is not None else ""
        print(f"{shape} {name} by {by}: {seconds * 1e6:,.1f} us{share}", flush=True)

    def compare(self, name: str, shape: str, tokens: int) -> None:
        """An operation by its kernel and its reference, with the largest difference of what they leave."""
        from qlora_dist.model import kernels
        from qlora_dist.model.kernels.traffic import bytes_moved

        operation = name.partition("+")[0]

        def make_for(function: Callable[..., Any]) -> Callable[[], Callable[[], Any]]:
            def make() -> Callable[[], Any]:
                arguments = operands(name, SHAPES[shape], tokens, self.device)
                return lambda: function(*arguments)

            return make

        kernel, reference = getattr(kernels, operation), reference_of(operation)
        arguments = operands(name, SHAPES[shape], tokens, torch.device("meta"))
        moved = bytes_moved(operation, arguments)
        set_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(arguments))
        self.measure(name, "triton", shape, moved, make_for(kernel), set_bytes)
        self.measure(name, "reference", shape, moved, make_for(reference), set_bytes)
        torch.cuda.empty_cache()
        if all(entry["seconds"] is not None for entry in self.results[-2:]):
            self.results[-2]["largest_difference"] = self.difference(name, kernel, reference, shape)

    def difference(self, name: str, kernel: Callable[..., Any], reference: Callable[..., Any], shape: str) -> float:
        """Largest difference between what both leave in their operands, relative to the largest value there."""
        both = []
        for function in (kernel, reference):
            torch.manual_seed(0)
            arguments = operands(name, SHAPES[shape], 512, self.device)
            function(*arguments)
            both.append(tensors_of(arguments))
        pairs = [(a.double(), b.double()) for a, b in zip(*both, strict=True)]
        return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)

    def liger(self, shape: str, tokens: int) -> None:
        """Liger's kernels on the same shapes, contiguous as it requires."""
        for name, (make, set_bytes) in liger_calls(SHAPES[shape], tokens, self.device).items():
            self.measure(name, "liger", shape, None, make, set_bytes)
            torch.cuda.empty_cache()


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    flat = [one for value in arguments for one in (value if isinstance(value, list) else [value])]
    return [one for one in flat if isinstance(one, Tensor)]


def liger_calls(
    shape: Shape, tokens: int, device: torch.device
) -> dict[str, tuple[Callable[[], Callable[[], Any]], int]]:
    """For each operation that Liger has: makes a call on new operands, and their bytes."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import rope_backward, rope_forward
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

    def random(*sizes: int, needs_gradient: bool = False) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16).requires_grad_(needs_gradient)

    def norm() -> Callable[[], Any]:
        x, weight = random(tokens, shape.hidden), random(shape.hidden)
        return lambda: LigerRMSNormFunction.apply(x, weight, EPS)

    def norm_backward() -> Callable[[], Any]:
        x, weight = random(tokens, shape.hidden, needs_gradient=True), random(shape.hidden)
        out, grad = LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False), random(tokens, shape.hidden)
        return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)

    def rope(function: Callable[..., Any]) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            q, k = (random(1, tokens, n, shape.head_dim).transpose(1, 2) for n in (shape.heads, shape.kv_heads))
            cos, sin = (random(1, tokens, shape.head_dim) for _ in range(2))
            return lambda: function(q, k, cos, sin)

        return make

    def gate() -> Callable[[], Any]:
        a, b = random(tokens, shape.intermediate), random(tokens, shape.intermediate)
        return lambda: swiglu_forward(a, b)

    def gate_backward() -> Callable[[], Any]:
        a, b, grad = (random(tokens, shape.intermediate) for _ in range(3))
        return lambda: swiglu_backward(a, b, grad)

    hidden, inner = 2 * tokens * shape.hidden, 2 * tokens * shape.intermediate
    heads = 2 * tokens * (shape.heads + shape.kv_heads) * shape.head_dim
    return {
        "rms_norm": (norm, 2 * hidden),
        "rms_norm_backward": (norm_backward, 3 * hidden),
        "rotate_heads": (rope(rope_forward), heads),
        "rotate_heads_backward": (rope(rope_backward), heads),
        "swiglu": (gate, 3 * inner),
        "swiglu_backward": (gate_backward, 3 * inner),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["8b", "70b"], choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    try:
        provenance.require_clean(arguments.allow_dirty)
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device; without one, benchmarks.kernels_compiled shows the machine code")
        if importlib.util.find_spec("triton") is None:
            raise UserError("Triton is not installed, so both sides would be the reference; pip install triton")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda", 0)
    origin = provenance.collect(provenance.this_command("benchmarks.kernels"), device)
    before = provenance.device_state(device)
    comparison = Comparison(device)
    comparison.measure_copy()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for shape in arguments.shapes:
        for name in arguments.only:
            comparison.compare(name, shape, arguments.tokens)
            _write(arguments.out, comparison, origin, before)  # after each: a time limit keeps it
        if importlib.util.find_spec("liger_kernel") is not None:
            comparison.liger(shape, arguments.tokens)
    _write(arguments.out, comparison, origin, before)


def _write(path: Path, comparison: Comparison, origin: dict[str, Any], before: Any) -> None:
    content = {
        "benchmark": "kernels",
        "provenance": origin,
        "device_state": {"before": before, "after": provenance.device_state(comparison.device)},
        "l2_cache_bytes": comparison.cache_bytes,
        "copy_bytes_per_second": comparison.copy_bytes_per_second,
        "results": comparison.results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
