"""What this machine is, asked in a process of its own.

A process that asks CUDA for a device's name or memory makes a context there, about half a GiB until it ends. The queue
lives as long as all its items: it would take that from each of them, and change what they measure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .. import provenance

_QUESTION = """
import json, sys, torch
from benchmarks import provenance
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
print(json.dumps({"gpu_bytes": sizes, "origin": provenance.collect("", device)}))
"""
LIMIT_SECONDS = 120  # torch from a cold disk


@dataclass(frozen=True)
class Machine:
    """GPUs by their memory, and the provenance of what is measured here, without command and date."""

    gpu_bytes: tuple[int, ...]
    origin: dict[str, Any]


@lru_cache(maxsize=1)
def machine() -> Machine:
    """Asked once. Raises RuntimeError with the answer's error where the question fails."""
    done = subprocess.run(
        [sys.executable, "-c", _QUESTION], cwd=provenance.ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"this machine's devices cannot be asked: {done.stderr.strip()[-1000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Machine(tuple(found["gpu_bytes"]), found["origin"])
