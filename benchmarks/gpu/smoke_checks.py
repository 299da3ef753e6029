"""What a smoke case is made of: where it runs, what it compares, and how a value is judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BF16 = 2.0**-8  # distance of two neighbours in bf16, relative; rounding is off by half of it at most


class Skip(Exception):
    """The case cannot run here; its text says why."""


@dataclass(frozen=True)
class Check:
    """A value that must lie between `least` and `tolerance`. A value that is no number never does."""

    what: str
    value: float
    tolerance: float
    why: str  # where the tolerance comes from
    least: float = 0.0

    @property
    def agrees(self) -> bool:
        return math.isfinite(self.value) and self.least <= self.value <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        value = self.value if math.isfinite(self.value) else None  # JSON knows no NaN
        return {"what": self.what, "value": value, "tolerance": self.tolerance, "least": self.least, "why": self.why,
                "agrees": self.agrees}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where cases run: a device, and a folder that they share."""

    device: torch.device
    work: Path

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


Case = Callable[[Bench], list[Check]]


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """|found - reference| / |reference|, norms over all elements, in fp64 on the host."""
    left, right = found.detach().double().cpu(), reference.detach().double().cpu()
    return float((left - right).norm() / right.norm())
