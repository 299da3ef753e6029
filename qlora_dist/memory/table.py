"""A plan as text: one line per item with a bar, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from ..files import format_bytes
from .constants import Item
from .plan import MemoryPlan

BAR = 24  # characters of a full bar


def plan_lines(plan: MemoryPlan, bar: int = BAR) -> Iterator[str]:
    """The table of a plan; `bar`: characters of a full bar."""
    recomputed = {0: "no layer", plan.num_layers: "every layer"}.get(
        plan.recompute, f"the first {plan.recompute} of {plan.num_layers} layers"
    )
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
    batch = f"{plan.micro_rows} x {plan.row_tokens:,} tokens at a time"
    yield (
        f"{plan.base_parameters:,} base and {plan.trainable_parameters:,} trained weights; "
        f"{plan.strategy} over {ranks}; {batch}; {recomputed} recomputed"
    )
    yield ""
    yield f"On each GPU, at the peak ({plan.peak_at})"
    yield from _items(plan.items, plan.peak_bytes, bar)
    yield f"  {'total':<28}{format_bytes(plan.peak_bytes):>10}"
    yield ""
    yield "On the host, per rank"
    yield from _items(plan.host_items, plan.host_peak_bytes, bar)
    yield f"  {'total':<28}{format_bytes(plan.host_peak_bytes):>10}"
    yield ""
    yield verdict(plan)
    yield from (f"  {line}" for line in plan.advice)
    yield from (f"Note: {line}" for line in plan.remarks)


def _items(items: dict[str, Item], total: int, bar: int) -> Iterator[str]:
    for name, item in items.items():
        filled = round(bar * item.size / total)
        drawn = "█" * filled + "·" * (bar - filled)
        yield f"  {name:<28}{format_bytes(item.size):>10}  {drawn}  {item.note}"


def verdict(plan: MemoryPlan) -> str:
    """Whether the plan fits, and with how much headroom."""
    needed = format_bytes(plan.peak_bytes)
    if plan.device_bytes is None:
        return f"Needs {needed}" + (
            f", {format_bytes(plan.pageable_bytes)} of which can move to the host" if plan.pageable_bytes else ""
        )
    device = format_bytes(plan.device_bytes)
    assert plan.headroom_bytes is not None
    if not plan.fits:
        return f"Does not fit: {shortfall(plan)}" + (". To make it fit:" if plan.advice else "")
    if plan.paged_out_bytes:
        return (
            f"Fits in {device} with {format_bytes(plan.paged_out_bytes)} of optimizer states on the host, "
            "transferred over the bus at every step"
        )
    return f"Fits in {device}; {format_bytes(plan.headroom_bytes)} free at the peak"


def shortfall(plan: MemoryPlan) -> str:
    """By how much a plan exceeds the device."""
    assert plan.device_bytes is not None and plan.headroom_bytes is not None
    return f"{format_bytes(-plan.headroom_bytes)} more than the {format_bytes(plan.device_bytes)} available"


def summary_lines(plan: MemoryPlan) -> Iterator[str]:
    """A plan in a few lines, for the start of a run on GPUs: the largest items, the verdict. Nothing for a CPU."""
    if plan.device_bytes is None:
        return
    largest = sorted(plan.items.items(), key=lambda item: -item[1].size)[:5]
    parts = ", ".join(f"{name} {format_bytes(item.size)}" for name, item in largest)
    yield f"planned for each GPU: {format_bytes(plan.peak_bytes)} at the peak ({parts}, ...)"
    if plan.fits:
        yield verdict(plan)
