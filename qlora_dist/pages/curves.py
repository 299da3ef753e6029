"""The numbers of a run as points of a chart, at most LIMIT of them, however many steps it has.

Consecutive steps share a point: 1, then 2, 4, 8, ... of them, as the run grows. A point knows their mean, lowest and
highest value, so that a spike of one step stays visible. One step costs the same whether it is the tenth or the
millionth, and memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

LIMIT = 512  # points of a series: as many as a chart has room for

# what a chart of steps shows, as in metrics.jsonl
KEYS = ("loss", "lr", "grad_norm", "tokens_per_second", "peak_bytes", "imbalance")
HELD_OUT = ("eval_loss",)


@dataclass
class _Point:
    """Consecutive samples: where the last one lies, and [number, sum, lowest, highest] of each value."""

    step: int
    tokens: float  # trained on so far
    seconds: float  # of training so far
    values: dict[str, list[float]] = field(default_factory=dict)

    def take(self, later: _Point) -> None:
        self.step, self.tokens, self.seconds = later.step, later.tokens, later.seconds
        for key, (number, total, low, high) in later.values.items():
            own = self.values.setdefault(key, [0, 0.0, math.inf, -math.inf])
            own[:] = own[0] + number, own[1] + total, min(own[2], low), max(own[3], high)


class Series:
    """Samples in their order, merged so that at most LIMIT points are left."""

    def __init__(self) -> None:
        self.width = 1  # samples of a point
        self.num_samples = 0
        self.points: list[_Point] = []

    def add(self, point: _Point) -> None:
        """One sample more."""
        if self.num_samples % self.width:
            self.points[-1].take(point)
        else:
            self.points.append(point)
        self.num_samples += 1
        if len(self.points) > LIMIT:
            self.width *= 2
            merged = self.points[::2]
            for left, right in zip(merged, self.points[1::2]):
                left.take(right)
            self.points = merged

    def to_json(self, keys: Iterable[str]) -> dict[str, Any]:
        """`width`, the three x axes, and for each key with a value its `mean`, and `low` and `high` where they differ.

        Lists of one length; null where a point has no value of the key.
        """
        found: dict[str, Any] = {
            "width": self.width,
            "step": [point.step for point in self.points],
            "tokens": [round(point.tokens) for point in self.points],
            "seconds": [round(point.seconds, 2) for point in self.points],
        }
        for key in keys:
            values = [point.values.get(key) for point in self.points]
            if not any(values):
                continue
            found[key] = {"mean": [value and _short(value[1] / value[0]) for value in values]}
            if any(value and value[0] > 1 for value in values):
                found[key]["low"] = [value and _short(value[2]) for value in values]
                found[key]["high"] = [value and _short(value[3]) for value in values]
        return found


class Curves:
    """The series of one run, from the lines of its metrics.jsonl, added in their order."""

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        self.steps = Series()
        self.held_out = Series()
        self.last: dict[str, Any] = {}  # the newest value of each name
        self.best: tuple[float, int] | None = None  # (held-out loss, step)
        self._tokens = self._seconds = 0.0
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """The values of one step. What is no finite number is left out."""
        values = {key: float(value) for key, value in line.items() if is_number(value)}
        step = int(line["step"])
        self._tokens += values.get("tokens", 0.0)
        self._seconds += values.get("step_seconds", 0.0) + values.get("data_seconds", 0.0)
        self.steps.add(self._point(step, values, KEYS))
        self.last |= values
        self.add_held_out(step, line)

    def add_held_out(self, step: int, values: dict[str, Any]) -> None:
        """Held-out values after `step` updates, if there are any; 0: before training."""
        loss = values.get("eval_loss")
        if is_number(loss):
            self.held_out.add(self._point(step, {"eval_loss": float(loss)}, HELD_OUT))
            self.last["eval_loss"] = loss
            if self.best is None or loss < self.best[0]:
                self.best = float(loss), step

    def _point(self, step: int, values: dict[str, float], keys: Iterable[str]) -> _Point:
        found = {key: [1, values[key], values[key], values[key]] for key in keys if key in values}
        return _Point(step, self._tokens, self._seconds, found)

    @property
    def tokens(self) -> float:
        """Trained on so far."""
        return self._tokens

    @property
    def seconds(self) -> float:
        """Of training so far: steps and waits for data, without evaluations and saves."""
        return self._seconds


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a file is a number that a chart can show."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _short(value: float) -> float:
    """Six digits: more cannot be seen, and would make the page larger."""
    return float(f"{value:.6g}")
