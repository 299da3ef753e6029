"""What calibration reads from raw files: each becomes one `Measured`, with a list of what it lacks.

Files from a CPU and files of plans and simulations are refused: a constant must come from a GPU.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_dist.config import RunConfig, parse_config
from qlora_dist.errors import UserError
from qlora_dist.memory import MemoryPlan, plan_memory, shapes_from_config
from qlora_dist.memory.gpus import DEQUANT_EFFICIENCY, Gpu, estimate_speed

from ..cells import Cell
from ..repro_65b import llama_65b
from ..shapes import config_json, shape_of

NOT_MEASURED = ("planned", "plan_vs_simulation", "simulation")


@dataclass
class Measured:
    """One run on a GPU. Bytes are per rank; None if the file lacks the value."""

    file: str
    content: dict[str, Any]
    config: RunConfig
    shapes: Any
    plan: MemoryPlan  # with this code's constants
    allocated_bytes: int
    reserved_bytes: int | None
    context_bytes: int | None
    planned_tensor_bytes: int
    seconds_per_token: float | None
    is_full_rows: bool  # one document per row, as the speed estimate assumes
    lacks: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return str(self.content["provenance"]["device"])

    @property
    def micro_tokens(self) -> int:
        return self.plan.micro_rows * self.plan.row_tokens

    @property
    def is_full_tuning(self) -> bool:
        return self.config.lora is None

    def parts(self, gpu: Gpu) -> tuple[float, float]:
        """Seconds per token of one rank at an efficiency of 1, for FLOPs and dequantization; from the package's
        estimate."""
        seconds = []
        for memory_rate in (math.inf, gpu.memory_rate):  # without memory traffic, and with it
            speed = estimate_speed(self.config, self.shapes, self.plan, Gpu("", 0, gpu.peak_flops, memory_rate, 1.0))
            assert speed is not None
            seconds.append(self.plan.world_size / speed.tokens_per_second)
        return seconds[0], (seconds[1] - seconds[0]) * DEQUANT_EFFICIENCY


def read_all(out: Path) -> tuple[list[Measured], dict[str, Any] | None]:
    """This package's runs below a folder, and ceilings.json. Raises UserError if there is nothing to use, and for a
    file that was not measured on a GPU, or on a different kind than the others."""
    measured: list[Measured] = []
    ceilings = None
    for path in sorted(out.rglob("*.json")):
        name = str(path.relative_to(out))
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            continue
        kind = content.get("benchmark")
        if kind in NOT_MEASURED:
            raise UserError(f"{path}: planned or simulated, not measured; calibrate only from files from a GPU")
        is_cell = "cell" in content and content["cell"].get("engine") == "ours" and content.get("status") == "ok"
        if kind not in ("ceilings", "repro_65b") and not is_cell:
            continue
        _require_gpu(path, content)
        if kind == "ceilings":
            ceilings = content
        elif one := (_of_cell(name, content) if is_cell else _of_repro(name, content)):
            measured.append(one)
    if not measured and ceilings is None:
        raise UserError(
            f"{out}: no measured cell of this package, no ceilings.json and no repro_65b.json; run the GPU queue first"
        )
    found = {one.device for one in measured} | ({ceilings["provenance"]["device"]} if ceilings else set())
    if len(found) > 1:
        raise UserError(f"{out}: files from several kinds of GPU, {', '.join(sorted(found))}; calibrate from one")
    return measured, ceilings


def _require_gpu(path: Path, content: dict[str, Any]) -> None:
    origin = content.get("provenance") or {}
    if not origin.get("hardware", {}).get("gpus") or not origin.get("driver"):
        raise UserError(
            f"{path}: measured on {origin.get('device', 'an unknown device')}, without a GPU and its driver; calibrate "
            "only from files from a GPU"
        )


def _of_cell(name: str, content: dict[str, Any]) -> Measured | None:
    from ..ours import config_of

    known = Cell.__dataclass_fields__
    cell = Cell(**{key: value for key, value in content["cell"].items() if key in known})
    if cell.row_tokens <= 0 or cell.method == "full-fp16":  # the benchmark's own step, which is not planned
        return None
    config = config_of(cell, Path("model"), Path("data"), Path("scratch"))
    memory = content.get("memory") or {}
    rate = (content.get("figures") or {}).get("tokens_per_second") or {}
    one = _measured(name, content, config, config_json(shape_of(cell.shape, cell.layers)), cell.ranks)
    return _with_memory(
        one,
        memory,
        cell.packing and cell.data == "full",
        cell.ranks / rate["median"] if rate.get("median") else None,
    )


def _of_repro(name: str, content: dict[str, Any]) -> Measured | None:
    """The paper's run; None unless it has full size."""
    if not content.get("is_full_size"):
        return None
    config = parse_config(content["config"])
    one = _measured(name, content, config, llama_65b(), 1)
    memory = {
        "allocated_bytes": content.get("peak_bytes"),
        "reserved_bytes": content.get("reserved_bytes"),
        "context_bytes": content.get("context_bytes"),
    }
    rate = content.get("tokens_per_second")
    return _with_memory(one, memory, True, 1 / rate if rate else None)


def _measured(name: str, content: dict[str, Any], config: RunConfig, model: dict[str, Any], ranks: int) -> Measured:
    shapes = shapes_from_config(model)
    assert shapes is not None
    plan = plan_memory(config, shapes, world_size=ranks, device_bytes=None)
    return Measured(name, content, config, shapes, plan, 0, None, None, plan.tensor_bytes, None, True)


def _with_memory(
    one: Measured, memory: dict[str, Any], is_full_rows: bool, seconds_per_token: float | None
) -> Measured | None:
    """Fills in the measured values. None for a file without the peak of its tensors."""
    if not memory.get("allocated_bytes"):
        return None
    one.allocated_bytes = memory["allocated_bytes"]
    one.reserved_bytes = memory.get("reserved_bytes")
    one.context_bytes = memory.get("context_bytes")
    used = memory.get("device_used_bytes")
    if one.context_bytes is None and used is not None and one.reserved_bytes is not None:
        # what is in use outside the allocator, if no other process uses the card
        outside = used - one.reserved_bytes
        one.context_bytes = outside if outside > 0 else None
        one.lacks.append("context_bytes (derived from device_used_bytes)")
    one.lacks += [what for what in ("reserved_bytes", "context_bytes") if getattr(one, what) is None]
    one.seconds_per_token = seconds_per_token
    one.is_full_rows = is_full_rows
    if seconds_per_token is None:
        one.lacks.append("tokens_per_second")
    return one


def ceiling_rates(ceilings: dict[str, Any] | None, what: str, ending: str) -> list[float]:
    """Values of one kind in ceilings.json, GB/s."""
    if ceilings is None:
        return []
    return [
        entry["value"]
        for entry in ceilings["results"]
        if entry["what"] == what and entry["case"].endswith(ending) and entry.get("value")
    ]
