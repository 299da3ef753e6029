"""Bar charts of the report, see qlora_dist.pages.bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_dist import pages


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: stacked parts, with a whisker from `low` to `high` where the spread is known."""

    label: str
    parts: tuple[float, ...]
    low: float | None = None
    high: float | None = None


def bar_chart(
    title: str, bars: Sequence[Bar], unit: str, names: Sequence[str] = (), marks: Sequence[pages.Mark] = ()
) -> pages.BarChart:
    """Horizontal bars, each with the sum of its parts; `names` label the parts of a stacked bar, `marks` are lines."""
    written = [pages.Bar(bar.label, bar.parts, number(sum(bar.parts)), bar.low, bar.high) for bar in bars]
    return pages.BarChart(title, unit, written, names, marks=marks)


def number(value: float) -> str:
    """About four significant digits: 12,340 or 123.4; below 1, three decimals: 0.123."""
    if value == 0:
        return "0"
    digits = max(0, 4 - len(str(int(abs(value))))) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
