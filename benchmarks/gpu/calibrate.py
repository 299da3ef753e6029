"""Fits the constants that cannot be computed, of the memory plan and the speed estimate, to a run's results.

    python -m benchmarks.gpu calibrate OUT

Reads cells of this package, ceilings.json and repro_65b.json below OUT, fits the constants that they determine, and
prints each constant before and after, and the errors of plan and estimate for each file, before and after. The same as
JSON in OUT/calibration.json. Sources are not changed: a person changes a constant, citing the files.

    CONTEXT_BYTES       the measured context, median
    RESERVE_SHARE       what the allocator reserved above the peak of all tensors: the largest share, since a plan that
                        fits must not fail
    WORKSPACE_BYTES     what tensors take above the rest of the plan, by the same amount in every file, if enough files
                        of different sizes separate it from an error that grows with size
    DEQUANT_EFFICIENCY  dequantization in ceilings.json over the GPU's memory bandwidth; without it, from cells with
                        different numbers of tokens per micro-batch
    Gpu.efficiency      from cells whose micro-batch is large enough that the GPU does not wait for the host
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.errors import UserError
from qlora_dist.memory import constants, gpus

from .. import provenance
from .calibrate_files import Measured, ceiling_rates, read_all

SMALLEST_BYTES = 2**30  # of tensors: below this, the allocator's 20 MiB blocks are a large share
BUSY_TOKENS = 4096  # a smaller micro-batch leaves the GPU waiting for launches
WORKSPACE_FILES = 4
WORKSPACE_ERROR_BYTES = 16 * 2**20  # a fit with a larger standard error is discarded


@dataclass
class Constant:
    """One constant; `after` is None if the files do not determine it, with the reason in `note`."""

    name: str
    before: float
    after: float | None = None
    note: str = ""
    files: list[str] = field(default_factory=list)

    @property
    def best(self) -> float:
        return self.before if self.after is None else self.after


def calibrate(out: Path) -> dict[str, Any]:
    """Prints the tables and writes OUT/calibration.json. Raises UserError for files that were not measured on a GPU, or
    were measured on different kinds of GPU."""
    measured, ceilings = read_all(out)
    gpu = gpu_named(measured[0].device if measured else ceilings["provenance"]["device"])
    found = [
        fit_context(measured),
        fit_reserve(measured),
        fit_workspace(measured),
        *fit_speed(measured, ceilings, gpu),
    ]
    by_name = {constant.name: constant for constant in found}
    files = [_errors(one, by_name, gpu) for one in measured]
    origin = (measured[0].content if measured else ceilings)["provenance"]
    result = {
        "benchmark": "calibration",
        "provenance": {**origin, "command": provenance.this_command("benchmarks.gpu")},
        "gpu": gpu.name,
        "constants": [vars(constant) for constant in found],
        "files": files,
        "errors": {kind: summary(files, kind) for kind in KINDS},
    }
    (out / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    print(text(result))
    return result


def gpu_named(device: str) -> gpus.Gpu:
    """The entry of memory.gpus for a device's name. Raises UserError if there is none."""
    words = re.findall("[a-z0-9]+", device.lower())
    # rtx4090 is RTX 4090, a100-80 is A100-SXM4-80GB
    runs = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    for name in sorted(gpus.GPUS, key=len, reverse=True):
        if all(part in runs or f"{part}gb" in runs for part in name.split("-")):
            return gpus.GPUS[name]
    raise UserError(f"{device} is not among the GPUs of qlora_dist/memory/gpus.py; add it there first")


# --- memory -----------------------------------------------------------------------------------------------------------


def fit_context(measured: list[Measured]) -> Constant:
    constant = Constant("CONTEXT_BYTES", constants.CONTEXT_BYTES)
    values = {one.file: one.context_bytes for one in measured if one.context_bytes is not None}
    if not values:
        constant.note = "no file has the size of the context"
        return constant
    constant.after, constant.files = statistics.median(values.values()), list(values)
    constant.note = f"from {min(values.values()):,.0f} to {max(values.values()):,.0f}"
    return constant


def fit_reserve(measured: list[Measured]) -> Constant:
    constant = Constant("RESERVE_SHARE", constants.RESERVE_SHARE)
    shares = {
        one.file: one.reserved_bytes / one.allocated_bytes - 1
        for one in measured
        if one.reserved_bytes is not None and one.allocated_bytes >= SMALLEST_BYTES
    }
    if not shares:
        constant.note = "no file of 1 GiB or more has both allocated and reserved bytes"
        return constant
    worst = max(shares, key=lambda name: shares[name])
    constant.after, constant.files = shares[worst], list(shares)
    constant.note = f"the largest, from {worst}; median {statistics.median(shares.values()):.4f}"
    return constant


def fit_workspace(measured: list[Measured]) -> Constant:
    """allocated = (1 + error) * the rest of the plan + workspace, by least squares."""
    constant = Constant("WORKSPACE_BYTES", constants.WORKSPACE_BYTES)
    rests = np.array([_without_workspace(one) for one in measured])
    if len({round(rest) for rest in rests}) < WORKSPACE_FILES:
        constant.note = f"needs {WORKSPACE_FILES} files of different sizes, found {len(set(rests))}"
        return constant
    held = np.array([float(one.allocated_bytes) for one in measured])
    columns = np.stack([rests, np.ones_like(rests)], axis=1)
    solution = np.linalg.lstsq(columns, held, rcond=None)[0]
    workspace, residuals = float(solution[1]), held - columns @ solution
    spread = float(residuals @ residuals) / max(1, len(rests) - 2)
    error = float(np.sqrt(spread * np.linalg.inv(columns.T @ columns)[1, 1]))
    if error > WORKSPACE_ERROR_BYTES or workspace < 0:
        constant.note = f"not determined: {workspace / 2**20:.0f} MiB, give or take {error / 2**20:.0f}"
        return constant
    constant.after, constant.files = workspace, [one.file for one in measured]
    constant.note = f"give or take {error / 2**20:.1f} MiB"
    return constant


def _without_workspace(one: Measured) -> float:
    return float(one.planned_tensor_bytes - constants.WORKSPACE_BYTES)


# --- speed ------------------------------------------------------------------------------------------------------------


def fit_speed(measured: list[Measured], ceilings: dict[str, Any] | None, gpu: gpus.Gpu) -> list[Constant]:
    """Seconds per token = FLOPs part / efficiency + dequantization part / its efficiency; the package gives both."""
    efficiency = Constant("Gpu.efficiency", gpu.efficiency)
    dequant = Constant("DEQUANT_EFFICIENCY", gpus.DEQUANT_EFFICIENCY)
    if not gpu.peak_flops:
        efficiency.note = dequant.note = f"{gpu.name} has no rates in memory.gpus"
        return [efficiency, dequant]
    rates = ceiling_rates(ceilings, "dequantize nf4", ", double")
    if rates:
        dequant.after = statistics.median(rates) * 1e9 / gpu.memory_rate
        dequant.files, dequant.note = ["ceilings.json"], f"of {gpu.memory_rate / 1e12:.2f} TB/s"
    busy = [one for one in measured if one.seconds_per_token is not None and one.micro_tokens >= BUSY_TOKENS]
    busy = [one for one in busy if one.is_full_rows and not one.is_full_tuning]
    if not busy:
        efficiency.note = f"no cell of full rows with at least {BUSY_TOKENS} tokens per micro-batch"
        return [efficiency, dequant]
    parts = np.array([one.parts(gpu) for one in busy])  # (files, 2) seconds per token at an efficiency of 1
    seconds = np.array([float(one.seconds_per_token or 0) for one in busy])
    weighted, ones = parts / seconds[:, None], np.ones(len(busy))  # errors count relative to each file's time
    if dequant.after is None and len(busy) > 1 and np.linalg.cond(weighted / weighted.max(0)) < 100:
        inverse = np.linalg.lstsq(weighted, ones, rcond=None)[0]
        if inverse.min() > 0:
            dequant.after, dequant.files = float(1 / inverse[1]), [one.file for one in busy]
            dequant.note = "from cells; ceilings.json would give it directly"
    if dequant.after is None:
        dequant.note = "the cells do not determine it, and there is no ceilings.json"
    left = ones - weighted[:, 1] / dequant.best
    inverse_efficiency = float(weighted[:, 0] @ left / (weighted[:, 0] @ weighted[:, 0]))
    if inverse_efficiency <= 0:
        efficiency.note = "dequantization alone would take longer than the cells did"
        return [efficiency, dequant]
    efficiency.after, efficiency.files = 1 / inverse_efficiency, [one.file for one in busy]
    efficiency.note = f"{gpu.name}, of {gpu.peak_flops / 1e12:.0f} TFLOP/s"
    return [efficiency, dequant]


# --- errors -----------------------------------------------------------------------------------------------------------

KINDS = {
    "tensors": "planned tensors against max_memory_allocated",
    "peak": "planned peak against reserved bytes and context",
    "speed": "estimated tokens per second against measured",
}


def _errors(one: Measured, by_name: dict[str, Constant], gpu: gpus.Gpu) -> dict[str, Any]:
    """Relative errors before and after; null if the file lacks the measured value."""
    found: dict[str, Any] = {"file": one.file, "lacks": one.lacks, "is_busy": one.micro_tokens >= BUSY_TOKENS}
    for when in ("before", "after"):
        value = {name: constant.before if when == "before" else constant.best for name, constant in by_name.items()}
        peak = speed = None
        planned = _without_workspace(one) + value["WORKSPACE_BYTES"]
        tensors = planned / one.allocated_bytes - 1
        if one.reserved_bytes is not None and one.context_bytes is not None:
            whole = planned * (1 + value["RESERVE_SHARE"]) + value["CONTEXT_BYTES"]
            peak = whole / (one.reserved_bytes + one.context_bytes) - 1
        if one.seconds_per_token is not None and gpu.peak_flops:
            flops, moved = one.parts(gpu)
            estimated = flops / value["Gpu.efficiency"] + moved / value["DEQUANT_EFFICIENCY"]
            speed = one.seconds_per_token / estimated - 1
        found[when] = {"tensors": tensors, "peak": peak, "speed": speed}
    return found


def summary(files: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Median and largest absolute error, before and after, and the number of files."""
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        sizes = [abs(one[when][kind]) for one in files if one[when][kind] is not None]
        found["files"] = len(sizes)
        found[when] = {"median": statistics.median(sizes), "largest": max(sizes)} if sizes else None
    return found


def text(result: dict[str, Any]) -> str:
    """The tables for the terminal."""
    lines = [f"{result['gpu']}: constants", f"  {'':<20}{'before':>14}{'after':>14}"]
    for one in result["constants"]:
        after = "-" if one["after"] is None else _number(one["after"])
        lines.append(f"  {one['name']:<20}{_number(one['before']):>14}{after:>14}  {one['note']}")
    head = f"  {'error':<50}{'files':>6}{'before: median':>16}{'largest':>9}{'after: median':>16}{'largest':>9}"
    lines += ["", head]
    for kind, what in KINDS.items():
        error = result["errors"][kind]
        shown = [f"{error[when][of]:.1%}" if error[when] else "-" for when in ("before", "after")
                 for of in ("median", "largest")]  # fmt: skip
        lines.append(f"  {what:<50}{error['files']:>6}{shown[0]:>16}{shown[1]:>9}{shown[2]:>16}{shown[3]:>9}")
    lines += ["", f"  {'file':<58}" + "".join(f"{kind:>18}" for kind in KINDS)]
    for one in result["files"]:
        shown = [_pair(one["before"][kind], one["after"][kind]) for kind in KINDS]
        lacks = f"  lacks {', '.join(one['lacks'])}" if one["lacks"] else ""
        lines.append(f"  {one['file']:<58}" + "".join(f"{pair:>18}" for pair in shown) + lacks)
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"


def _pair(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:+.1%} {after:+.1%}"
