"""The command `qlora-dist plan`."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import asdict
from typing import Any

from ...config import RunConfig
from ...errors import printable, wrapped
from ...files import format_bytes
from ...memory import MemoryPlan
from ...memory.gpus import Gpu
from ...memory.planned import make_plan
from ...memory.table import BAR
from ..screen import styled, write_json

WIDE, NARROW_BAR = 110, 8  # columns of a terminal from which on bars are long; characters of a full bar on others


def run_plan_command(
    config: RunConfig, *, gpu: str | None, ranks: int, as_json: bool, simulate: bool, nodes: int = 1
) -> None:
    """Prints the plan of a run on `ranks` GPUs of this kind (None: what it needs, and which GPUs it fits on)."""
    plan = make_plan(config, gpu, ranks, nodes=nodes)
    trace, predicted = _simulation(config, plan.memory, plan.device) if simulate else (None, None)
    if as_json:
        write_json(plan.as_dict() | {"simulation": trace, "prediction": predicted}, indent=1)
        return
    is_narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < WIDE
    lines = plan.lines(NARROW_BAR if is_narrow else BAR, is_estimated=predicted is None)
    if trace is not None:
        lines += ["", f"Simulated peak of all tensors: {format_bytes(trace['peak_bytes'])} ({trace['peak_at']});"]
        lines += [f"  {name:<28}{format_bytes(size):>10}" for name, size in trace["categories"].items()]
        lines += [f"planned for them: {format_bytes(trace['planned_bytes'])} ({trace['error']:+.2%})"]
    if predicted is not None:
        lines += _prediction_lines(predicted, ranks)
    _show(lines)


def _simulation(
    config: RunConfig, plan: MemoryPlan, device: Gpu | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a step takes of memory and, on a GPU whose data are known, of time."""
    from ...model import load_config
    from .roofline import predict, rates_of, trace_micro_step
    from .simulate import simulate

    pretrained = load_config(config.model.name, config.model.revision)
    rates = None if device is None else rates_of(device)
    predicted = None
    if device is None or rates is None:
        trace = simulate(config, plan, pretrained)
    else:
        roofline, trace = trace_micro_step(config, plan, pretrained, rates)
        found = predict(config, plan, roofline, device)
        predicted = asdict(found) | {"is_host_bound": found.is_host_bound, "rates": asdict(rates), "gpu": device.name}
    memory = {
        "peak_bytes": trace.peak_bytes,
        "peak_at": trace.peak_at,
        "categories": trace.categories,
        "planned_bytes": trace.planned_bytes,
        "error": trace.error,
    }
    return memory, predicted


def _prediction_lines(found: dict[str, Any], ranks: int) -> list[str]:
    """Never to be taken for a measurement."""
    rates, kinds = found["rates"], found["seconds_by_kind"]
    device = sum(kinds.values())
    shares = ", ".join(f"{name} {seconds / device:.0%}" for name, seconds in kinds.items())
    host = f"the host needs {1e3 * found['host_seconds']:,.0f} ms for its {found['kernels']:,} kernels"
    bound = "so it is the bound" if found["is_host_bound"] else "so it is not the bound"
    gpus = f"{ranks} GPUs, which wait for nothing" if ranks > 1 else "one GPU"
    once = f"once in {found['micro_steps']} micro-steps" if found["micro_steps"] > 1 else "after each"
    return [
        "",
        f"Predicted from a trace of the real code, not measured: about {found['tokens_per_second']:,.0f} tokens/s "
        f"on {gpus}",
        f"  micro-step {1e3 * device:,.0f} ms: {shares}",
        f"  {host}, {bound}; update {1e3 * found['update_seconds']:,.1f} ms {once}",
        f"  {found['share_of_peak']:.0%} of the card's peak in 16-bit products, recomputation counted; rates assumed: "
        f"{rates['product_flops'] / 1e12:,.0f} TFLOP/s, {rates['bandwidth'] / 1e12:.2f} TB/s",
    ]


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
