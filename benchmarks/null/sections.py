"""The report's sections on results of the null device."""

from __future__ import annotations

from typing import Any

from ..cells import Cell
from ..sections import GIB, Link, Section, Table

MARK = "Null device: the real CUDA allocator, no values, no time on the device."


def plan(raw: Any) -> Section | None:
    content = raw.others.get("plan")
    if content is None or content.get("benchmark") != "null_plan":
        return None
    link = Link("raw", raw.paths["plan"])
    rows = []
    for one in content["points"]:
        point = one["point"]
        layers = point["layers"] or "all"
        recompute, offload = point["recompute"], "yes" if point["offload"] else "no"
        rows.append(
            [point["shape"], layers, f"{point['micro_rows']} x {point['row_tokens']:,}", recompute, offload,
             point["rank"], point["optimizer"], one["peak_bytes"] / GIB, one["planned_bytes"] / GIB,
             f"{one['plan_error']:+.2%}", one["reserved_bytes"] / GIB, link]
        )  # fmt: skip
    header = ["shape", "layers", "rows x tokens", "recompute", "offload", "r", "optimizer", "peak GiB", "planned GiB",
              "plan error", "reserved GiB", "raw"]  # fmt: skip
    commits = sorted({one["commit"][:12] for one in content["points"]})
    text = (
        f"{MARK} Peak bytes that PyTorch's CUDA allocator reports for three training steps, and what the memory plan "
        f"counts as tensors; paged optimizer states are outside of both. Largest error of the plan: "
        f"{content['largest_error']:+.2%} ({content['largest_error_at']}). Peaks were measured at "
        f"{', '.join(commits)}, the plan is that of {content['provenance']['commit'][:12]}."
    )
    return Section(
        f"{raw.name}: the allocator's peak against the plan", text, [Table("", header, rows)], kind="null device"
    )


def large_model(raw: Any) -> Section | None:
    content = raw.others.get("repro_65b")
    if content is None or "null" not in content["provenance"]["device"]:
        return None
    figures = [
        ("tensors at the peak, steps and saving", content["peak_bytes"]),
        ("tensors at the peak while the model is built", content["build_peak_bytes"]),
        ("reserved by the allocator", content["reserved_bytes"]),
        ("the most that the card holds, load to last file, context included", content["device_used_bytes"]),
        ("CUDA context (assumed)", content["context_bytes"]),
        ("paged optimizer states, if all are on the card", content["paged_optimizer_bytes"]),
        ("the card", content["cap_bytes"]),
    ]
    rows = [[name, size / GIB, Link("raw", raw.paths["repro_65b"])] for name, size in figures]
    held = content["reserved_with_context_bytes"] + content["paged_optimizer_bytes"]
    config = content["config"]
    text = (
        f"{MARK} LLaMA-65B, r = {config['lora']['rank']}, rows of {config['data']['row_tokens']} tokens, weights: "
        f"{content['weights']}. They are loaded and quantized, {len(content['losses'])} steps, a checkpoint and the "
        f"adapter follow, all with the card's size as a limit: {held / GIB:.2f} of {content['cap_bytes'] / GIB:.2f} "
        f"GiB are taken with every optimizer state on the card, error of the plan {content['plan_error']:+.2%}."
    )
    return Section(
        f"{raw.name}: 65B on a 48 GB card", text, [Table("", ["what", "GiB", "raw"], rows)], kind="null device"
    )


def host(raw: Any) -> Section | None:
    content = raw.others.get("host")
    if content is None or content.get("benchmark") != "null_host":
        return None
    tables = []
    for title in dict.fromkeys(one["group"] for one in content["cells"]):
        rows: list[list[Any]] = []
        for one in [cell for cell in content["cells"] if cell["group"] == title]:
            figures = [
                one.get(name) for name in ("cpu_seconds", "cpu_seconds_over_ours", "seconds", "seconds_over_ours")
            ]
            counts = [None if name not in one else round(one[name]) for name in ("launches", "synchronizations")]
            label = Cell(**one["cell"]).label + ("" if one["status"] == "ok" else f": {one['status']}")
            rows.append([label, *figures, *counts, Link("raw", raw.paths["host"])])
        header = ["engine", "CPU s", "CPU s / ours", "wall s", "wall s / ours", "launches", "synchronizations", "raw"]
        tables.append(Table(title, header, rows))
    text = (
        f"{MARK} A kernel takes no time there: these are seconds of Python and dispatch per step of one full row of "
        f"2,048 tokens, which bound a step on any card that is faster. CPU seconds are user and system time of the "
        f"process, all threads. The engines of a table are loaded together and step in turns; medians over the turns, "
        f"ratios within each. Attention is torch's flash attention for all (a card also has cuDNN's); weights: "
        f"{content['weights']}."
    )
    return Section(f"{raw.name}: host seconds of a step", text, tables, kind="null device")


ALL = (plan, large_model, host)
