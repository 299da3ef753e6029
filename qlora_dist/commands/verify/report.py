"""Results of `verify`: claims with measured differences, tolerances and verdicts, as a table or as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tolerances:
    """Relative differences that rounding explains. Typical defects (a leak between documents, a mean of means, a lost
    row) give 1 % to 100 %.
    """

    labels: float  # NLL of single labels, L2 over a document
    loss: float  # mean over a batch: rounding of many labels averages out
    gradient: float  # L2 over all trained weights
    steps: float  # losses and gradient norms of a few updates


# fp32: sums in another order give about 1e-6 after the layers of a model; 1e-4 leaves room for a hundred layers.
# bf16: one rounding is up to 2**-9 = 0.2 %; about ten a layer add up like random steps, 1 % for a single label. Over
# ranks every row is computed in the same way, and only fp32 sums change: what remains are adapters that round to
# another bf16 number now and then.
TOLERANCES = {
    "float32": Tolerances(labels=1e-4, loss=1e-5, gradient=1e-4, steps=1e-4),
    "bfloat16": Tolerances(labels=3e-2, loss=5e-3, gradient=3e-2, steps=1e-2),
}


def tolerances_of(compute_dtype: str, quantization: str) -> Tolerances:
    """int8 layers compute in 16 bit whatever the compute type is, and round a row's activations by its largest."""
    return TOLERANCES["bfloat16" if quantization == "int8" else compute_dtype]


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, both L2."""
    left, right = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((left - right).norm() / right.norm().clamp_min(1e-300))


@dataclass(frozen=True)
class Proof:
    """One claim. `difference` None: not checked, `note` gives the reason."""

    name: str
    difference: float | None
    tolerance: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """holds, FAILED or not checked."""
        if self.difference is None or self.tolerance is None:
            return "not checked"
        # not "difference > tolerance": NaN must fail
        return "holds" if self.difference <= self.tolerance else "FAILED"


def not_checked(name: str, reason: str) -> Proof:
    """A claim that could not be checked."""
    return Proof(name, None, None, reason)


def failed(name: str, reason: str) -> Proof:
    """A claim that failed before anything could be compared."""
    return Proof(name, math.inf, 0.0, reason)


@dataclass(frozen=True)
class Report:
    """All claims about one config."""

    subject: str  # model, strategy, ranks, steps
    proofs: list[Proof]
    seconds: float

    @property
    def failures(self) -> list[Proof]:
        """Claims that do not hold."""
        return [proof for proof in self.proofs if proof.verdict == "FAILED"]

    def table(self) -> str:
        """One line per claim: difference, tolerance, verdict."""
        rows = [("claim", "difference", "tolerance", "verdict")]
        rows += [(p.name, _number(p.difference), _number(p.tolerance), p.verdict) for p in self.proofs]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = []
        for index, row in enumerate(rows):
            note = "" if index == 0 or not self.proofs[index - 1].note else f"  {self.proofs[index - 1].note}"
            first, *others, last = (cell.ljust(width) for cell, width in zip(row, widths))
            lines.append("  ".join([first, *others, last + note]).rstrip())
        return "\n".join(lines)

    def sentence(self) -> str:
        """The outcome in words."""
        num_held = sum(proof.verdict == "holds" for proof in self.proofs)
        num_open = len(self.proofs) - num_held - len(self.failures)
        left_open = f"; {num_open} not checked" if num_open else ""
        if self.failures:
            names = ", ".join(proof.name for proof in self.failures)
            return f"FAILED: {names} ({num_held} of {len(self.proofs)} claims hold{left_open}) for {self.subject}"
        return f"{num_held} of {len(self.proofs)} claims hold{left_open} for {self.subject}, in {self.seconds:.0f} s"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "subject": self.subject,
            "passed": not self.failures,
            "seconds": self.seconds,
            "proofs": [{**asdict(proof), "verdict": proof.verdict} for proof in self.proofs],
        }


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"
