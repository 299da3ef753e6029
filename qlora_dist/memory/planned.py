"""What a run needs on GPUs of one kind, from its config and the model's config.json: what `plan` says."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import RunConfig
from ..errors import UserError, printable
from ..files import format_bytes
from .choosing import choose, largest_micro_rows, largest_row_tokens, with_shards
from .gpus import GPUS, Gpu, Speed, estimate_speed, parse_gpu, without_bfloat16
from .plan import MemoryPlan, plan_memory
from .read_shapes import read_shapes
from .shapes import ModelShapes
from .table import BAR, plan_lines, verdict


@dataclass(frozen=True, repr=False)
class Plan:
    """The memory of one GPU and its host at the peak, in bytes. `print` it for the table; a notebook draws it."""

    config: RunConfig
    ranks: int
    device: Gpu | None  # None: what a run needs, whatever it runs on
    memory: MemoryPlan
    shapes: ModelShapes

    @property
    def items(self) -> dict[str, int]:
        """Bytes on each GPU at the peak, by what they are for."""
        return {name: item.size for name, item in self.memory.items.items()}

    @property
    def host_items(self) -> dict[str, int]:
        """Bytes in host memory, of one rank."""
        return {name: item.size for name, item in self.memory.host_items.items()}

    @property
    def peak_bytes(self) -> int:
        """Their sum on each GPU."""
        return self.memory.peak_bytes

    @property
    def host_peak_bytes(self) -> int:
        """Their sum on the host, of one rank."""
        return self.memory.host_peak_bytes

    @property
    def recompute(self) -> int:
        """Layers whose activations are recomputed: as configured, or for `auto` the fewest that fit."""
        return self.memory.recompute

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch: as configured, or for `auto` the fastest that fit."""
        return self.memory.micro_rows

    @property
    def advice(self) -> tuple[str, ...]:
        """Where it does not fit, the changes that would make it fit, cheapest first."""
        return self.memory.advice

    def fits(self, gpu: str | None = None) -> bool:
        """Whether it fits on this GPU (a name such as a6000, or an amount such as 48GiB), or on the one of the plan."""
        if gpu is not None:
            return self.on(gpu).fits()
        if self.memory.fits is None:
            raise UserError("the plan is of no GPU; name one, such as fits('a6000') or fits('48GiB')")
        return self.memory.fits

    def on(self, gpu: str, ranks: int | None = None) -> Plan:
        """The plan of the same config on other GPUs."""
        return make_plan(self.config, gpu, self.ranks if ranks is None else ranks, self.shapes)

    @property
    def fitting_gpus(self) -> list[str]:
        """The known GPUs that have room for it as it is, smallest first."""
        needed = self.memory.peak_bytes - self.memory.pageable_bytes
        by_size = sorted(GPUS.values(), key=lambda gpu: gpu.device_bytes)
        return [gpu.name for gpu in by_size if gpu.device_bytes >= needed]

    @property
    def is_bfloat16(self) -> bool:
        return self.config.model.compute_dtype == "bfloat16"

    @cached_property
    def limits(self) -> dict[str, int]:
        """The longest rows and the largest micro-batch that fit on the GPU of the plan; empty without one."""
        if self.device is None:
            return {}
        sizes = {"world_size": self.ranks, "device_bytes": self.device.device_bytes}
        return {
            "largest_row_tokens": largest_row_tokens(self.config, self.shapes, **sizes),
            "largest_micro_rows": largest_micro_rows(self.config, self.shapes, **sizes),
        }

    @cached_property
    def speed(self) -> Speed | None:
        """An estimate of tokens per second over all ranks, with its assumptions; None for a GPU of unknown speed."""
        return None if self.device is None else estimate_speed(self.config, self.shapes, self.memory, self.device)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as of `qlora-dist plan --json`."""
        return self.memory.to_json() | {
            "gpu": None if self.device is None else self.device.name,
            **self.limits,
            "tokens_per_second_estimate": None if self.speed is None else round(self.speed.tokens_per_second),
            "estimate_assumes": None if self.speed is None else self.speed.assumptions,
        }

    def lines(self, bar: int = BAR, is_estimated: bool = True) -> list[str]:
        """The table; `bar`: characters of a full bar; `is_estimated`: with the estimate of its speed."""
        lines = list(plan_lines(self.memory, bar))
        if self.device is None:
            fitting = ", ".join(map(self._with_its_lack, self.fitting_gpus)) or "none of the known GPUs"
            return [*lines, f"Fits on: {fitting} (pass --gpu for the settings that fit best)"]
        tokens, rows = self.limits["largest_row_tokens"], self.limits["largest_micro_rows"]
        positions = self.shapes.max_positions
        of_all = f", of the model's {positions:,} positions" if positions else ""
        lines += [
            "",
            f"Longest rows that fit: {tokens:,} tokens{of_all} (micro-batches of one row, every layer recomputed)",
            f"Largest micro-batch that fits: {rows:,} rows (every layer recomputed)",
        ]
        if is_estimated and self.speed is not None:
            lines += [f"About {self.speed.tokens_per_second:,.0f} tokens/s ({self.speed.assumptions})"]
        if self.is_bfloat16 and not self.device.has_bfloat16:
            lines += ["", f"Note: {without_bfloat16(f'a {self.device.name}')}"]
        return lines

    def _with_its_lack(self, gpu: str) -> str:
        return gpu + " (which has no bfloat16)" * (self.is_bfloat16 and not GPUS[gpu].has_bfloat16)

    def __str__(self) -> str:
        return printable("\n".join(self.lines()))

    def __repr__(self) -> str:
        where = "" if self.device is None else f" on {self.ranks} x {self.device.name}"
        return printable(f"<Plan of {self.config.model.name}{where}: {verdict(self.memory)}>")

    def _repr_html_(self) -> str:
        rows = []
        for name, item in self.memory.items.items():
            width = round(200 * item.size / self.memory.peak_bytes)
            bar = f'<div style="background:#4477aa;height:0.8em;width:{width}px"></div>'
            cells = (html.escape(printable(name)), format_bytes(item.size), bar, html.escape(printable(item.note)))
            rows.append("".join(f'<td style="text-align:left">{cell}</td>' for cell in cells))
        after = [verdict(self.memory), *self.advice, *self.memory.remarks]
        return (
            f"<table><caption>On each GPU, at the peak ({html.escape(self.memory.peak_at)}): "
            f"{format_bytes(self.peak_bytes)}</caption>"
            + "".join(f"<tr>{row}</tr>" for row in rows)
            + "</table>"
            + "".join(f"<div>{html.escape(printable(line))}</div>" for line in after)
        )


def make_plan(
    config: RunConfig, gpu: str | None = None, ranks: int = 1, shapes: ModelShapes | None = None, nodes: int = 1
) -> Plan:
    """The plan of a run on `ranks` GPUs of this kind; None: what it needs, and which GPUs it fits on. Raises UserError.

    With a GPU, `auto` settings become those that fit best. `shapes`: where they were read before. `nodes`: over which
    the GPUs are spread evenly.
    """
    device = None if gpu is None else parse_gpu(gpu)
    shapes = shapes or read_shapes(config.model.name, config.model.revision)
    if ranks % nodes:
        raise UserError(f"{ranks} ranks on {nodes} nodes: expected the same number on each; give a multiple of {nodes}")
    device_bytes = None if device is None else device.device_bytes
    config = with_shards(config, shapes, world_size=ranks, node_ranks=ranks // nodes, device_bytes=device_bytes)
    if device is None:
        memory = plan_memory(config, shapes, world_size=ranks, device_bytes=None)
    else:
        memory = choose(config, shapes, world_size=ranks, device_bytes=device.device_bytes)
    return Plan(config, ranks, device, memory, shapes)
