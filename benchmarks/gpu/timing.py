"""How long a kernel takes: many calls between two events, on operands that no cache holds."""

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
    """Sets of operands that calls take in turns: at least three, and together more than twice the L2 cache.

    Between two uses of a set the others pass through the cache: at least 4/3 of it, so a set is read from memory each
    time, as a layer's weights are in a step.
    """
    return max(3, math.floor(2 * cache_bytes / set_bytes) + 1)


def num_calls(seconds: float) -> int:
    """Calls in a sample, by what one takes: enough for some milliseconds, within 20 and 50.

    An event costs, and the first launch behind a synchronization waits for the host: 5 to 15 microseconds that a call
    alone would be charged with, and one of 20 hardly is.
    """
    return min(MOST_CALLS, max(LEAST_CALLS, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def seconds_of(works: Sequence[Callable[[], Any]], device: torch.device, at_least: float) -> tuple[list[float], int]:
    """Mean seconds of a call in each sample, and the calls of a sample; over `at_least` seconds and three samples.

    `works` is the same call on each set of operands, taken in turns. Results are held for a turn, so that theirs are
    different addresses too.
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
