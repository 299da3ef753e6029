"""Raw samples of a cell -> the results that are compared. Pure functions of raw data."""

from __future__ import annotations

import statistics
from typing import Any

from .shapes import shape_of

# dense 16-bit FLOP/s from datasheets, by a part of the device's name
DATASHEET_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A6000": 155e12, "4090": 165e12}


def of(result: dict[str, Any], gemm: dict[str, Any] | None, device: str = "") -> dict[str, Any]:
    """Results of one cell: rates (median, spread), the share of what the machine can do, and energy per token."""
    samples = result["samples"]
    if result["status"] != "ok" or not samples:
        return {}
    seconds = [sample["seconds"] for sample in samples]
    found: dict[str, Any] = {"num_samples": len(samples), "step_seconds_median": statistics.median(seconds)}
    if result["cell"]["engine"] == "gemm":
        rates = [result["flops_per_step"] / value for value in seconds]
        return found | {"flops_per_second": summary(rates)}
    found["tokens_per_second"] = summary([sample["tokens"] / sample["seconds"] for sample in samples])
    found["label_tokens_per_second"] = summary([sample["labels"] / sample["seconds"] for sample in samples])
    cell = result["cell"]
    shape = shape_of(cell["shape"], cell["layers"])
    is_full = cell["method"].startswith("full")
    factor = 6 if is_full else 4
    median = found["tokens_per_second"]["median"]
    world_size = max(1, result.get("world_size", 1))
    found["flops_per_token_convention"] = f"{factor}N, N = {shape.linear_parameters:,} weights of matrices and head"
    achieved = factor * shape.linear_parameters * median / world_size
    found["model_flops_per_second"] = achieved
    peak = next((flops for name, flops in DATASHEET_FLOPS.items() if name in device), None)
    found["mfu_of_datasheet"] = None if peak is None else achieved / peak
    rate = gemm["figures"]["flops_per_second"]["median"] if gemm and gemm.get("figures") else None
    if rate is None and gemm and gemm["status"] == "ok" and gemm["samples"]:
        rate = statistics.median(gemm["flops_per_step"] / sample["seconds"] for sample in gemm["samples"])
    found["share_of_measured_gemm"] = None if rate is None else achieved / rate
    if result.get("energy_joules"):
        tokens = sum(sample["tokens"] for sample in samples)
        found["joules_per_token"] = result["energy_joules"] / tokens  # of the whole cell, including startup
    return found


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios of rates of cells that stepped in turns; they stay the same on a faster machine."""
    rate = {
        (r["cell"]["engine"], r["cell"]["method"]): r["figures"]["tokens_per_second"]["median"]
        for r in results
        if r["status"] == "ok"
    }
    ours = rate["ours", "nf4-dq"]
    return {"nf4_over_lora": ours / rate["ours", "lora-bf16"], "ours_over_trainer": ours / rate["trainer", "nf4-dq"]}


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles, extremes."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median": statistics.median(ordered),
        "quartile_low": quartiles[0],
        "quartile_high": quartiles[2],
        "least": ordered[0],
        "most": ordered[-1],
    }


def one_line(result: dict[str, Any]) -> str:
    """One line for the terminal while a grid runs."""
    if result["status"] == "oom":
        return out_of_memory(result)
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason'].strip().splitlines()[-1][:200] if result['reason'] else ''}"
    values = result["figures"]
    if "flops_per_second" in values:
        return f"{values['flops_per_second']['median'] / 1e9:,.1f} GFLOP/s"
    same = result.get("same_work")
    note = "  NOT THE SAME WORK" if same is not None and same["is_same"] is False else ""
    return (
        f"{values['tokens_per_second']['median']:,.1f} tokens/s, peak {result['memory']['peak_bytes'] / 2**30:.3f} GiB"
        f" above imports, start {result['startup_seconds']:.1f} s{note}"
    )


def out_of_memory(result: dict[str, Any]) -> str:
    """`OOM at X GiB, planned Y GiB`."""
    memory = result.get("memory") or {}
    reached = memory.get("reserved_bytes", memory.get("peak_bytes"))
    plan = (result.get("plan") or {}).get("peak_bytes")
    at = f"at {reached / 2**30:.1f} GiB" if reached is not None else "(killed by the system)"
    return f"OOM {at}, " + (f"planned {plan / 2**30:.1f} GiB" if plan is not None else "no plan")
