"""What this machine has, queried in a separate process.

A process that asks CUDA for a device's name or memory creates a context there, about half a GiB until it exits. The
queue runs as long as all its items: it would take that memory from each of them, and change what they measure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .. import provenance

_QUERY = """
import json, sys, torch
from benchmarks import provenance
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
print(json.dumps({"gpu_bytes": sizes, "origin": provenance.collect("", device)}))
"""
LIMIT_SECONDS = 120  # importing torch from a cold disk


@dataclass(frozen=True)
class Machine:
    """The GPUs' memory sizes, and the provenance of results measured here, without command and date."""

    gpu_bytes: tuple[int, ...]
    origin: dict[str, Any]


@lru_cache(maxsize=1)
def machine() -> Machine:
    """Queried once. Raises RuntimeError with the query's error if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", _QUERY], cwd=provenance.ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"this machine's devices cannot be queried: {done.stderr.strip()[-1000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Machine(tuple(found["gpu_bytes"]), found["origin"])
