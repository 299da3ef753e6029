"""The parts of a smoke case: where it runs, what it compares, and its tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BF16 = 2.0**-8  # relative; rounding to bf16 is off by at most this


class Skip(Exception):
    """The case cannot run here; its text is the reason."""


@dataclass(frozen=True)
class Check:
    """A value that must be between `least` and `tolerance`; a NaN or infinite value never is."""

    what: str
    value: float
    tolerance: float
    why: str  # where the tolerance comes from
    least: float = 0.0

    @property
    def agrees(self) -> bool:
        return math.isfinite(self.value) and self.least <= self.value <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        value = self.value if math.isfinite(self.value) else None  # JSON has no NaN
        return {"what": self.what, "value": value, "tolerance": self.tolerance, "least": self.least, "why": self.why,
                "agrees": self.agrees}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where cases run: a device, and a shared folder."""

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
