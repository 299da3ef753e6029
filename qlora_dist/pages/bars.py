"""Horizontal bars, which templates/bars.html makes of boxes: labels of any length wrap, no width is known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """One bar: stacked parts, with a whisker from `low` to `high` where the spread is known."""

    label: str
    parts: tuple[float, ...]
    text: str  # its value, in words
    low: float | None = None
    high: float | None = None

    @property
    def end(self) -> float:
        """Where it or its whisker ends."""
        return max(sum(self.parts), self.high or 0.0)


@dataclass(frozen=True)
class Mark:
    """A vertical line through all bars, with its name above them."""

    value: float
    text: str


@dataclass(frozen=True)
class BarChart:
    """`names` label the parts of stacked bars."""

    title: str
    unit: str
    bars: Sequence[Bar]
    names: Sequence[str] = ()
    largest: float | None = None  # what the whole width stands for; None: the longest bar
    marks: Sequence[Mark] = ()

    @property
    def _scale(self) -> float:
        """Percent of the width for 1."""
        ends = [bar.end for bar in self.bars] + [mark.value for mark in self.marks]
        return 100 / (self.largest or max(ends, default=0.0) or 1.0)

    @property
    def lines(self) -> list[tuple[str, float]]:
        """Name and place of each mark, as a percentage of the width."""
        return [(mark.text, round(mark.value * self._scale, 2)) for mark in self.marks]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """label, text and, as percentages of the width: parts, whisker (left, width), gap between bar and text."""
        scale = self._scale
        rows = []
        for bar in self.bars:
            whisker = None
            if bar.low is not None and bar.high is not None:
                whisker = (round(bar.low * scale, 2), round((bar.high - bar.low) * scale, 2))
            rows.append(
                {
                    "label": bar.label,
                    "text": bar.text,
                    "parts": [round(max(0.0, part) * scale, 2) for part in bar.parts],
                    "whisker": whisker,
                    "gap": round((bar.end - sum(bar.parts)) * scale, 2),
                }
            )
        return rows
