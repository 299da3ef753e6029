"""How long a kernel takes: many calls between two events, on operands that are not in a cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

SAMPLE_SECONDS = 0.005
LEAST_CALLS, MOST_CALLS = 20, 50
LEAST_SAMPLES, MOST_SAMPLES = 3, 500


def num_sets(set_bytes: float, cache_bytes: int) -> int:
    """The number of operand sets that calls cycle through: at least three, and together more than twice the L2 cache.

    Between two uses of a set the others pass through the cache: at least 4/3 of its size, so a set is read from memory
    each time, like a layer's weights in a step.
    """
    return max(3, math.floor(2 * cache_bytes / set_bytes) + 1)


def num_calls(seconds: float) -> int:
    """Calls per sample, from the seconds of one call: enough for some milliseconds, between 20 and 50.

    An event has a cost, and the first launch after a synchronization waits for the host: 5 to 15 microseconds, which
    would distort a single call but are negligible over 20.
    """
    return min(MOST_CALLS, max(LEAST_CALLS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def seconds_of(works: Sequence[Callable[[], Any]], device: torch.device, at_least: float) -> tuple[list[float], int]:
    """Mean seconds per call in each sample, and calls per sample; at least `at_least` seconds and three samples.

    `works` is the same call on each set of operands, used in turn. Results are kept for one cycle, so that their
    addresses differ too.
    """
    held: list[Any] = [None] * len(works)
    run = _on_gpu if device.type == "cuda" else _on_cpu

    def take(calls: int) -> float:
        return run(works, held, calls) / calls

    take(max(3, len(works)))  # compiles, plans, and fills the allocator with the blocks that will rotate
    calls = num_calls(take(3))
    samples: list[float] = []
    ends = time.perf_counter() + at_least
    while len(samples) < LEAST_SAMPLES or (time.perf_counter() < ends and len(samples) < MOST_SAMPLES):
        samples.append(take(calls))
    return samples, calls


def _on_gpu(works: Sequence[Callable[[], Any]], held: list[Any], calls: int) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for call in range(calls):
        place = call % len(works)
        held[place] = works[place]()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def _on_cpu(works: Sequence[Callable[[], Any]], held: list[Any], calls: int) -> float:
    started = time.perf_counter()
    for call in range(calls):
        place = call % len(works)
        held[place] = works[place]()
    return time.perf_counter() - started
