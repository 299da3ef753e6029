"""What the results say, first: each claim with its figure, how that was made, and the raw file that proves it.

Five kinds of figures, which are never mixed: measured (on a CPU; nothing was measured on a GPU), planned (arithmetic on
shapes), simulated (the real code under fake tensors), traced (its operations at the rates of a card) and null device
(CUDA's real allocator on a device that computes nothing). Every number comes from a raw file; a claim whose file is
absent is not made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_dist.memory.gpus import GPUS
from qlora_dist.pages import BarChart, Mark

from .charts import Bar, bar_chart, number
from .sections import GIB, MIB, Link, Table, label_of, median_of

MEASURED, PLANNED, SIMULATED, TRACED, NULL = "measured, CPU", "planned", "simulated", "traced", "null device"
KINDS = {
    MEASURED: "on the CPU that the raw file names",
    PLANNED: "by arithmetic on a model's shapes",
    SIMULATED: "by the real code under fake tensors, which have shapes and no values",
    TRACED: "from the operations of the real code, each at the rates of a card",
    NULL: "with CUDA's real allocator on a device that computes nothing",
}
CARDS = (("24 GB", "rtx4090"), ("48 GB", "a6000"), ("80 GB", "a100-80"))


@dataclass
class Claim:
    """One claim; `curves` is the data block of a chart, as qlora_dist/pages/assets/charts.js reads it."""

    claim: str
    figure: str
    kind: str
    proof: str
    links: list[Link]
    tables: list[Table] = field(default_factory=list)
    charts: list[BarChart] = field(default_factory=list)
    curves: dict[str, Any] | None = None


def find(raws: Sequence[Any], folder: str, name: str) -> tuple[dict[str, Any], Link] | None:
    """A raw file and the link to it."""
    for raw in raws:
        if raw.name == folder and name in raw.others:
            return raw.others[name], Link(f"{folder}/{name}.json", raw.paths[name])
    return None


# --- one function per claim -------------------------------------------------------------------------------------------


def equal_runs(raws: Sequence[Any]) -> Claim | None:
    found = find(raws, "cpu", "equal_runs")
    if found is None:
        return None
    content, link = found
    differences: Mapping[str, float] = content["largest_difference"]
    two, killed = differences["2 ranks"], differences["killed, started again"]
    again = "the same bits" if killed == 0 and content["repeated_steps_are_equal"] else f"within {killed:.1e}"
    proof = (
        f"{content['steps']} steps of the demo's run in fp32. On two ranks each loss is within {two:.1e} of one "
        f"rank's. Killed (SIGKILL) after step {content['killed_after']} and started again from the checkpoint of "
        f"step {content['resumed_from']}, the run repeats those steps and goes on with {again}."
    )
    figure = f"2 ranks: within {two:.0e}; killed and started again: {again}"
    widths, dashes = (11, 6, 2), (None, None, [6, 5])
    runs = []
    for i, (name, values) in enumerate(content["losses"].items()):
        steps = list(range(1, len(values) + 1))
        restarts = [content["resumed_from"]] if name.startswith("killed") else []
        runs.append(
            {"name": name, "steps": {"width": 1, "step": steps, "loss": {"mean": [round(v, 5) for v in values]}},
             "held_out": {}, "restarts": restarts, "planned": None, "line": widths[i], "dash": dashes[i]}
        )  # fmt: skip
    charts = [{"key": "loss", "title": "Loss of three runs over each other", "unit": "the dashed line: started again"}]
    shown = [1, *range(10, content["steps"] + 1, 10)]
    rows = [[step, *(f"{values[step - 1]:.7f}" for values in content["losses"].values())] for step in shown]
    return Claim(
        "The same loss curve on one rank, on two, and after a kill", figure, MEASURED, proof, [link],
        [Table("Losses", ["step", *content["losses"]], rows)], curves={"runs": runs, "charts": charts},
    )  # fmt: skip


def plan_and_simulation(raws: Sequence[Any]) -> Claim | None:
    found = find(raws, "cpu", "plan_vs_simulation")
    if found is None:
        return None
    content, link = found
    cells = content["cells"]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    rows = []
    for model in models:
        own = [cell for cell in cells if cell["model"] == model]
        worst = max(own, key=lambda cell: abs(cell["error"]))
        rows.append([model, len(own), f"{worst['error']:+.3%}",
                     f"rows of {worst['row_tokens']:,}, recompute {worst['recompute']}"])  # fmt: skip
    proof = (
        f"{len(cells)} combinations of model, row length and recomputation, one linear layer at a time: the plan's "
        "bytes against all tensors alive at the peak of a step of the real code. Neither is a measurement on a GPU."
    )
    header = ["model", "cells", "largest error of the plan", "at"]
    return Claim(
        "The memory plan is what the code holds", f"at most {content['largest_error']:.2%} off in {len(cells)} cells",
        SIMULATED, proof, [link], [Table("Plan against simulation", header, rows)],
    )  # fmt: skip


def allocator(raws: Sequence[Any]) -> Claim | None:
    found = find(raws, "null", "plan")
    if found is None:
        return None
    content, link = found
    proof = (
        f"{len(content['points'])} points from 1B to 70B: the peak that PyTorch's CUDA allocator reports for three "
        f"steps, and the plan's tensors. The largest error is at {content['largest_error_at']}."
    )
    figure = f"at most {abs(content['largest_error']):.2%} off at {len(content['points'])} points"
    return Claim("The memory plan is what CUDA's allocator hands out", figure, NULL, proof, [link])


def large_model(raws: Sequence[Any]) -> Claim | None:
    found = find(raws, "null", "repro_65b")
    if found is None:
        return None
    content, link = found
    held = (content["reserved_with_context_bytes"] + content["paged_optimizer_bytes"]) / GIB
    cap = content["cap_bytes"] / GIB
    proof = (
        f"All weights of LLaMA-65B are read (files of zeros), quantized and trained for {len(content['losses'])} steps "
        f"with the card's size as a limit; a checkpoint and the adapter are written. Plan error "
        f"{content['plan_error']:+.2%}."
    )
    figure = f"{held:.2f} of {cap:.2f} GiB, every optimizer state included"
    return Claim("65B fits on one 48 GB card", figure, NULL, proof, [link])


def planned(raws: Sequence[Any]) -> Claim | None:
    found = find(raws, "cpu", "planned")
    if found is None:
        return None
    content, link = found
    entries = [entry for entry in content["results"] if entry["method"] in ("nf4-dq", "lora-bf16")]
    names = sorted({name for entry in entries for name in entry["groups"]}, key=content["order"].index)
    peaks = {(entry["shape"], entry["method"]): entry["peak_bytes"] / GIB for entry in content["results"]}
    paged = {entry["shape"]: entry["groups"]["optimizer"] / GIB for entry in entries if entry["method"] == "nf4-dq"}
    called = {"nf4-dq": "QLoRA", "lora-bf16": "16-bit LoRA"}
    bars = [
        Bar(f"{entry['shape'].upper()}, {called[entry['method']]}",
            tuple(entry["groups"].get(name, 0) / GIB for name in names))
        for entry in entries
    ]  # fmt: skip
    marks = [Mark(GPUS[gpu].device_bytes / GIB, text) for text, gpu in CARDS]
    rows: list[list[Any]] = []
    for shape, optimizer in paged.items():
        peak = peaks[shape, "nf4-dq"]
        fitting = [text for text, gpu in CARDS if peak <= GPUS[gpu].device_bytes / GIB]
        paging = [text for text, gpu in CARDS if peak - optimizer <= GPUS[gpu].device_bytes / GIB < peak]
        rows.append([shape.upper(), peak, optimizer, fitting[0] if fitting else None, paging[0] if paging else None,
                     peaks[shape, "lora-bf16"], peaks[shape, "full-bf16"]])  # fmt: skip
    header = ["model", "QLoRA GiB", "of it pageable", "smallest card that holds all", "with states paged out",
              "16-bit LoRA GiB", "full fine-tuning GiB"]  # fmt: skip
    largest = rows[-1]
    figure = f"{largest[0]}: {number(largest[1])} GiB; 16-bit LoRA {number(largest[5])} GiB"
    return Claim(
        "A card for each size from 7B to 65B", figure, PLANNED, content["text"], [link],
        [Table("Planned peaks", header, rows)],
        [bar_chart("Planned memory by item, with the memory of three cards", bars, "GiB", names, marks)],
    )  # fmt: skip


def peers(raws: Sequence[Any]) -> Claim | None:
    """Speed and memory together, for each amount of recomputation: where ours is better, and where it is not."""
    raw = next((one for one in raws if one.name == "cpu"), None)
    cells = [
        cell
        for cell in (raw.cells if raw is not None else [])
        if (cell.get("group") or "").endswith("peers") and cell["status"] == "ok" and cell["cell"]["engine"] != "gemm"
    ]
    rows: list[list[Any]] = []
    said, figures, links, speeds, sizes = [], [], [], [], []
    for recompute, setting in (
        ("none", "peers packed, at their best"),
        ("full", "peers padded, as by default; ours packed"),
    ):
        own = [cell for cell in cells if cell["cell"]["recompute"] == recompute]
        ours = next((cell for cell in own if cell["cell"]["engine"] == "ours"), None)
        others = [cell for cell in own if cell is not ours]
        if ours is None or not others:
            continue
        speed, memory = median_of(ours), ours["memory"]["peak_bytes"]
        for cell in [ours, *others]:
            rows.append([f"recompute {recompute}", label_of(cell), median_of(cell), speed / median_of(cell),
                         cell["memory"]["peak_bytes"] / MIB, memory / cell["memory"]["peak_bytes"],
                         Link("raw", raw.paths[cell["name"]])])  # fmt: skip
            label = label_of(cell)
            values = cell["figures"]["tokens_per_second"]
            speeds.append(Bar(label, (values["median"],), values["quartile_low"], values["quartile_high"]))
            sizes.append(Bar(label, (cell["memory"]["peak_bytes"] / MIB,)))
        links.append(Link(f"cpu/{ours['name']}.json", raw.paths[ours["name"]]))
        gains = [speed / median_of(cell) for cell in others]
        shares = [memory / cell["memory"]["peak_bytes"] for cell in others]
        less = "less" if max(shares) < 1 else "MORE" if min(shares) > 1 else "partly more"
        said.append(
            f"Recompute {recompute} ({setting}): {_range(gains)} times their speed, {_range(shares)} times their "
            f"memory: {less} memory here."
        )
        figures.append(f"recompute {recompute}: {_range(gains)} x speed, {_range(shares)} x memory ({less})")
    if not rows:
        return None
    header = ["setting", "engine", "tokens/s", "ours / this", "peak MiB", "ours / this", "raw"]
    proof = (
        "Against transformers' Trainer and TRL with PEFT, on the same weights and documents, in turns, with equal "
        "first gradients. " + " ".join(said)
    )
    table = Table("Speed and memory together", header, rows)
    charts = [bar_chart("Speed", speeds, "tokens/s, median and quartiles"), bar_chart("Peak memory", sizes, "MiB")]
    return Claim(
        "Beside Trainer and TRL: speed and memory", "; ".join(figures), MEASURED, proof, links, [table], charts
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def kernels(raws: Sequence[Any]) -> Claim | None:
    found = [one for one in (find(raws, "traced", f"roofline-{shape}") for shape in ("8b", "70b")) if one is not None]
    if not found:
        return None
    rows: list[list[Any]] = []
    bars = []
    for content, _ in found:
        for cell in content["cells"]:
            rows.append([content["shape"].upper(), cell["recipe"], cell["recompute"], cell["ms_per_layer"],
                         round(cell["kernels_per_layer"])])  # fmt: skip
            if content is found[0][0]:
                bars.append(Bar(f"{cell['recipe']}, recompute {cell['recompute']}", (cell["ms_per_layer"],)))
    content = found[0][0]
    first = {cell["method"]: cell for cell in content["cells"] if cell["recompute"] == "none"}
    ours = first["ours"]
    best = min((cell for name, cell in first.items() if name != "ours"), key=lambda cell: cell["ms_per_layer"])
    figure = (
        f"{content['shape'].upper()}: {number(ours['ms_per_layer'])} ms, {ours['kernels_per_layer']:.0f} kernels a "
        f"layer; stock PEFT at its best {number(best['ms_per_layer'])} ms, {best['kernels_per_layer']:.0f}"
    )
    header = ["model", "recipe", "recompute", "ms a layer", "kernels a layer"]
    title = f"{content['shape'].upper()}, {content['tokens']:,} tokens, {content['gpu']}: predicted, one decoder layer"
    return Claim(
        "Fewer kernels and less time in a layer than stock PEFT", figure, TRACED, content["text"],
        [link for _, link in found], [Table("Predicted time of a layer", header, rows)], [bar_chart(title, bars, "ms")],
    )  # fmt: skip


def faults(raws: Sequence[Any]) -> Claim | None:
    found = find(raws, "cpu", "faults")
    if found is None:
        return None
    content, link = found
    rows = [[row["fault"], row["outcome"], row["steps_lost"], row["seconds"]] for row in content["results"]]
    loads = content["hardware"]["load_average"][0], content["hardware"]["load_average_at_end"][0]
    proof = (
        "After each fault the same command finished with the losses and weights, bit for bit, of an undisturbed run "
        f"of two ranks that saves every two steps. Seconds are those of a loaded machine (load {loads[0]:.0f} to "
        f"{loads[1]:.0f} on {content['hardware']['num_cpus']} cores). This file holds {len(rows)} faults; the test "
        "suite injects others."
    )
    header = ["fault", "outcome", "steps lost", "seconds to stop"]
    return Claim(
        "Runs survive their faults", f"{len(rows)} of {len(rows)} faults in the raw file", MEASURED, proof, [link],
        [Table("Faults survived", header, rows)],
    )  # fmt: skip


def host(raws: Sequence[Any]) -> Claim | None:
    """Where peers are better is a result as well."""
    found = find(raws, "null", "host")
    if found is None:
        return None
    content, link = found
    rows: list[list[Any]] = []
    ratios: dict[str, list[float]] = {}
    for cell in content["cells"]:
        if cell["status"] != "ok" or cell["cell"]["engine"] == "ours":
            continue
        ratio = 1 / cell["cpu_seconds_over_ours"]
        ratios.setdefault(cell["cell"]["recompute"], []).append(ratio)
        rows.append([cell["group"], label_of(cell), ratio])
    parts = [
        f"recompute {name}: {_range(values)} times theirs" for name, values in sorted(ratios.items(), reverse=True)
    ]
    proof = (
        "CPU seconds of Python and dispatch in a step, ours over theirs: above 1 the peer needs less. They bound a "
        "step only on a card that is faster than its host."
    )
    header = ["setting", "peer", "ours / theirs"]
    return Claim(
        "Host time of a step beside Trainer and TRL", "; ".join(parts), NULL, proof, [link],
        [Table("Host seconds", header, rows)],
    )  # fmt: skip


ALL = (equal_runs, faults, plan_and_simulation, allocator, large_model, planned, peers, kernels, host)


def claims(raws: Sequence[Any]) -> list[Claim]:
    """Those whose raw files are there, in the order of the page."""
    return [claim for claim in (make(raws) for make in ALL) if claim is not None]
