"""The command `qlora-dist plan`."""

from __future__ import annotations

import re
import shutil
import sys
from typing import Any

from ...config import RunConfig
from ...errors import printable, wrapped
from ...files import format_bytes
from ...memory import MemoryPlan
from ...memory.planned import make_plan
from ...memory.table import BAR
from ..screen import styled, write_json

WIDE, NARROW_BAR = 110, 8  # columns of a terminal from which on bars are long; characters of a full bar on others


def run_plan_command(config: RunConfig, *, gpu: str | None, ranks: int, as_json: bool, simulate: bool) -> None:
    """Prints the plan of a run on `ranks` GPUs of this kind (None: what it needs, and which GPUs it fits on)."""
    plan = make_plan(config, gpu, ranks)
    trace = _simulation(config, plan.memory) if simulate else None
    if as_json:
        write_json(plan.as_dict() | {"simulation": trace}, indent=1)
        return
    is_narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < WIDE
    lines = plan.lines(NARROW_BAR if is_narrow else BAR)
    if trace is not None:
        lines += ["", f"Simulated peak of all tensors: {format_bytes(trace['peak_bytes'])} ({trace['peak_at']});"]
        lines += [f"  {name:<28}{format_bytes(size):>10}" for name, size in trace["categories"].items()]
        lines += [f"planned for them: {format_bytes(trace['planned_bytes'])} ({trace['error']:+.2%})"]
    _show(lines)


def _simulation(config: RunConfig, plan: MemoryPlan) -> dict[str, Any]:
    from ...model import load_config
    from .simulate import simulate

    trace = simulate(config, plan, load_config(config.model.name, config.model.revision))
    return {
        "peak_bytes": trace.peak_bytes,
        "peak_at": trace.peak_at,
        "categories": trace.categories,
        "planned_bytes": trace.planned_bytes,
        "error": trace.error,
    }


def _show(lines: list[str]) -> None:
    """Plain text; on a terminal the bars are coloured, and lines are broken between words, notes under notes."""
    if not sys.stdout.isatty():
        print("\n".join(lines))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=styled(), highlight=False, soft_wrap=True)
    for line in lines:
        note = re.search("[█·]{2,}  ", line)
        text = Text(wrapped(printable(line), shutil.get_terminal_size().columns, note.end() if note else 2))
        text.highlight_regex("█+", "cyan")
        text.highlight_regex("·{2,}", "dim")
        text.highlight_regex(r"^(Fits|Longest|Largest|About)[^;(]*", "green")
        text.highlight_regex("^Does not fit[^.]*", "bold red")
        console.print(text)
