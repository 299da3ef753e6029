"""Bar charts as SVG text: no library, no script, readable in light and dark mode."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

COLORS = ("#3366aa", "#cc7722", "#449955", "#aa4466", "#888888", "#7755aa", "#227788", "#bb9911")
WIDTH, LABEL_WIDTH, BAR, GAP = 900, 360, 20, 8


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: stacked parts, with a whisker from `low` to `high` where the spread is known."""

    label: str
    parts: tuple[float, ...]
    low: float | None = None
    high: float | None = None


def bar_chart(title: str, bars: Sequence[Bar], unit: str, names: Sequence[str] = ()) -> str:
    """Horizontal bars; `names` label the parts of a stacked bar."""
    largest = max((max(sum(bar.parts), bar.high or 0.0) for bar in bars), default=0.0) or 1.0
    scale = (WIDTH - LABEL_WIDTH - 110) / largest
    top = 34 + (22 if names else 0)
    height = top + len(bars) * (BAR + GAP) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{_text(title)}" font-family="system-ui, sans-serif" font-size="13">',
        '<text x="0" y="18" font-size="15" font-weight="600" fill="currentColor">'
        f"{_text(title)} ({_text(unit)})</text>",
    ]
    x = 0.0
    for i, name in enumerate(names):
        color = COLORS[i % len(COLORS)]
        lines.append(f'<rect x="{x:.0f}" y="30" width="12" height="12" fill="{color}"/>')
        lines.append(f'<text x="{x + 17:.0f}" y="41" fill="currentColor">{_text(name)}</text>')
        x += 34 + 7.2 * len(name)
    for row, bar in enumerate(bars):
        y = top + row * (BAR + GAP)
        middle = y + BAR * 0.72
        lines.append(
            f'<text x="{LABEL_WIDTH - 8}" y="{middle:.1f}" text-anchor="end" fill="currentColor">'
            f"{_text(bar.label)}</text>"
        )
        x = float(LABEL_WIDTH)
        for i, part in enumerate(bar.parts):
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(0.0, part * scale):.1f}" height="{BAR}" '
                f'fill="{COLORS[i % len(COLORS)]}"/>'
            )
            x += max(0.0, part * scale)
        if bar.low is not None and bar.high is not None:
            left, right, center = LABEL_WIDTH + bar.low * scale, LABEL_WIDTH + bar.high * scale, y + BAR / 2
            lines.append(
                f'<path d="M{left:.1f} {center}H{right:.1f}M{left:.1f} {y + 5}V{y + BAR - 5}M{right:.1f} {y + 5}'
                f'V{y + BAR - 5}" stroke="currentColor" stroke-width="1.5" fill="none"/>'
            )
            x = max(x, right)
        lines.append(f'<text x="{x + 6:.1f}" y="{middle:.1f}" fill="currentColor">{number(sum(bar.parts))}</text>')
    return "\n".join([*lines, "</svg>"])


def number(value: float) -> str:
    """About four significant digits: 12,340 or 123.4; below 1, three decimals: 0.123."""
    if value == 0:
        return "0"
    digits = max(0, 4 - len(str(int(abs(value))))) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
