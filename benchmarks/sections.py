"""The sections of the report: raw results -> tables and charts. Every number comes from a raw file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_dist.pages import BarChart

from .cells import Cell
from .charts import Bar, bar_chart, number
from .figures import out_of_memory
from .quantization import findings

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Link:
    text: str
    path: str


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[Any]]


@dataclass
class Section:
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: list[BarChart] = field(default_factory=list)
    kind: str = ""  # of its figures, see claims.KINDS; empty: that of the folder


def shown(value: Any) -> str:
    """A value as displayed; a dash if there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else str(value)


def label_of(result: dict[str, Any]) -> str:
    return Cell(**result["cell"]).label


def _raw(raw: Any, name: str) -> Link:
    return Link("raw", raw.paths[name])


def median_of(result: dict[str, Any], name: str = "tokens_per_second") -> float | None:
    values = result.get("figures", {}).get(name)
    return None if values is None else values["median"]


def _spread(result: dict[str, Any]) -> str:
    values = result["figures"]["tokens_per_second"]
    return f"{number(values['median'])} [{number(values['quartile_low'])}, {number(values['quartile_high'])}]"


def _measured(raw: Any, group: str | None = None) -> list[dict[str, Any]]:
    """Cells with rates, without the GEMM; `group` is the end of a group's title."""
    return [
        cell
        for cell in raw.cells
        if cell["status"] == "ok"
        and cell["cell"]["engine"] != "gemm"
        and (group is None or (cell.get("group") or "").endswith(group))
    ]


def _is_same(result: dict[str, Any]) -> bool | None:
    same = result.get("same_work")
    return None if same is None else same["is_same"]


def _rate_bars(title: str, results: list[dict[str, Any]]) -> BarChart:
    bars = []
    for result in results:
        values = result["figures"]["tokens_per_second"]
        bars.append(Bar(label_of(result), (values["median"],), values["quartile_low"], values["quartile_high"]))
    return bar_chart(title, bars, "tokens/s, median and quartiles")


# --- one function per section -----------------------------------------------------------------------------------------


def machine(raw: Any) -> Section | None:
    origins: dict[Any, dict[str, Any]] = {}
    for content in [*raw.cells, *raw.others.values()]:
        origin = content.get("provenance", content)
        if "hardware" in origin:
            origins.setdefault((origin["commit"], origin["command"]), origin)
    rows = []
    for origin in origins.values():
        hardware = origin["hardware"]
        gpus = ", ".join(gpu["name"] for gpu in hardware.get("gpus", []))
        commit = (origin["commit"] or f"no checkout, code {origin['code_hash']}")[:12]
        is_dirty = (origin["commit"] or "").endswith("-dirty")
        is_stated = origin.get("commit_source") == "stated"  # by the caller, for a copy without .git
        versions = ", ".join(f"{name} {value}" for name, value in origin["versions"].items())
        rows.append(
            [origin["date"], f"`{origin['command']}`", commit + " with changes" * is_dirty + " (stated)" * is_stated,
             gpus or hardware["cpu"], hardware["num_cpus"], hardware["load_average"][0], origin["driver"], versions]
        )  # fmt: skip
    header = ["date", "command", "commit", "device", "CPUs", "load before", "driver", "versions"]
    return Section(f"{raw.name}: what was run", tables=[Table("", header, rows)]) if rows else None


def methods(raw: Any) -> Section | None:
    tables, charts = [], []
    for title in sorted({cell["group"] for cell in _measured(raw, "methods")}):
        results = _measured(raw, title)
        rows = [
            [label_of(r), _spread(r), median_of(r, "label_tokens_per_second"), r["memory"]["peak_bytes"] / MIB,
             r["memory"].get("steps_peak_rss_bytes", 0) / MIB, r["memory"].get("reserved_bytes", 0) / MIB or None,
             r["figures"]["share_of_measured_gemm"], r["figures"]["mfu_of_datasheet"], r["startup_seconds"],
             _raw(raw, r["name"])]
            for r in results
        ]  # fmt: skip
        header = ["method", "tokens/s", "label tokens/s", "peak MiB", "resident MiB", "reserved MiB",
                  "share of GEMM rate", "MFU", "start s", "raw"]  # fmt: skip
        tables.append(Table(title, header, rows))
        charts.append(_rate_bars(f"{title}: speed", results))
        bars = [Bar(label_of(r), (r["memory"]["peak_bytes"] / MIB,)) for r in results]
        charts.append(bar_chart(f"{title}: peak memory of the steps", bars, "MiB"))
    if not tables:
        return None
    return Section(f"{raw.name}: methods", _memory_verdict(_measured(raw, "methods")), tables, charts)


def _memory_verdict(results: list[dict[str, Any]]) -> str:
    peaks = {
        result["cell"]["method"]: result["memory"]["peak_bytes"] / MIB
        for result in results
        if result["cell"]["engine"] == "ours" and result["cell"]["packing"]
    }
    if not {"nf4-dq", "lora-bf16"} <= peaks.keys():
        return ""
    others = [name for name in ("lora-bf16", "full-bf16") if name in peaks]
    compared = ", ".join(f"{name} {number(peaks[name])} MiB" for name in others)
    is_least = all(peaks["nf4-dq"] < peaks[name] for name in others)
    return (
        f"Peak memory of QLoRA (nf4-dq): {number(peaks['nf4-dq'])} MiB, against {compared}: "
        f"{'below all of them' if is_least else 'NOT below all of them'}. Full fine-tuning here keeps fp32 master "
        "weights, gradients and Adam states, 16 bytes per parameter. The share of the GEMM rate is 4N FLOPs per token "
        "with adapters and 6N without, not counting recomputation, over the machine's rate measured in the same turns."
    )


def peers(raw: Any) -> Section | None:
    tables, charts = [], []
    for title in sorted(
        {cell["group"] for cell in raw.cells if cell.get("group", "").endswith(("peers", "full rows"))}
    ):
        results = _measured(raw, title)
        ours = [median_of(r) or 0.0 for r in results if r["cell"]["engine"] == "ours"]
        best = max(ours, default=0.0)
        rows = []
        for r in results:
            same = r.get("same_work") or {}
            verdict = {True: "same", False: "different", None: "not compared"}[_is_same(r)]
            rate = median_of(r)
            rows.append(
                [label_of(r), _spread(r), best / rate if rate and best else None, r["memory"]["peak_bytes"] / MIB,
                 r["memory"].get("steps_peak_rss_bytes", 0) / MIB, r["figures"]["share_of_measured_gemm"],
                 r["startup_seconds"], same.get("gradient_cosine"), verdict, _raw(raw, r["name"])]
            )  # fmt: skip
        header = ["engine", "tokens/s", "our best / this", "peak MiB", "resident MiB", "share of GEMM rate", "start s",
                  "gradient cosine", "work", "raw"]  # fmt: skip
        tables.append(Table(title, header, rows))
        charts.append(_rate_bars(f"{title}: speed", results))
    if not tables:
        return None
    text = (
        "Same weights, same documents in the same steps, same initial adapter weights, same optimizer. Work counts as "
        "the same if loss and gradients of the first step agree (cosine above 0.999)."
    )
    return Section(f"{raw.name}: against its peers", text, tables, charts)


def split(raw: Any) -> Section | None:
    results = [r for r in _measured(raw) if r["phases"]]
    names = ("data", "forward", "backward", "communication", "optimizer", "other")
    rows = [[label_of(r), r["cell"]["shape"], *(1000 * r["phases"][n] for n in names), _raw(raw, r["name"])]
            for r in results]  # fmt: skip
    bars = [
        Bar(f"{label_of(r)} ({r['cell']['shape']})", tuple(1000 * r["phases"][name] for name in names)) for r in results
    ]
    text = (
        "Mean of the instrumented steps, which are separate from the timed ones. Recomputation counts as backward; "
        "communication is the part that did not overlap with the backward pass."
    )
    header = ["engine", "shape", *(f"{name} ms" for name in names), "raw"]
    charts = [bar_chart("Where a step's time goes", bars, "ms", names)]
    return Section(f"{raw.name}: parts of a step", text, [Table("", header, rows)], charts) if rows else None


def memory_items(raw: Any) -> Section | None:
    """Measured items of each cell; on a GPU next to the plan's, which are for a GPU."""
    rows, bars = [], []
    names = ("base", "trainable", "gradients", "optimizer")
    has_gpu = any(r["provenance"]["hardware"].get("gpus") for r in raw.cells if "provenance" in r)
    for r in _measured(raw):
        if "items" not in r:
            continue
        sizes = [r["items"][name] / MIB for name in names]
        peak = r["memory"]["peak_bytes"] / MIB
        rest = peak - sum(sizes)
        bytes_planned = (r.get("plan") or {}).get("tensor_bytes")
        mib_planned = None if bytes_planned is None else bytes_planned / MIB
        error = None if mib_planned is None else (mib_planned - peak) / peak
        of_plan = [mib_planned, error] if has_gpu else []
        rows.append([label_of(r), r["cell"]["shape"], *sizes, rest, peak, *of_plan, _raw(raw, r["name"])])
        bars.append(Bar(f"{label_of(r)} ({r['cell']['shape']})", (*sizes, max(0.0, rest))))
    if not rows:
        return None
    text = (
        "Counted on the live tensors after the first update; the rest is the measured peak minus these: activations, "
        "dequantized matrices, logits, the allocator's slack (and on a CPU what libraries allocate while they run)."
    )
    if has_gpu:
        text += " Planned is what `qlora-dist plan` computes for the tensors."
    header = ["engine", "shape", *(f"{name} MiB" for name in names), "rest MiB", "peak MiB",
              *(["planned MiB", "plan error"] * has_gpu), "raw"]  # fmt: skip
    charts = [bar_chart("Memory by item", bars, "MiB", (*names, "rest"))]
    return Section(f"{raw.name}: memory by item", text, [Table("", header, rows)], charts)


def planned(raw: Any) -> Section | None:
    content = raw.others.get("planned")
    if content is None:
        return None
    names = sorted({name for entry in content["results"] for name in entry["groups"]}, key=content["order"].index)
    rows = [
        [entry["shape"], entry["method"], *(entry["groups"].get(name, 0) / GIB for name in names),
         entry["peak_bytes"] / GIB, _raw(raw, "planned")]
        for entry in content["results"]
    ]  # fmt: skip
    bars = [
        Bar(f"{entry['shape']} {entry['method']}", tuple(entry["groups"].get(name, 0) / GIB for name in names))
        for entry in content["results"]
    ]
    header = ["shape", "method", *(f"{name} GiB" for name in names), "peak GiB", "raw"]
    charts = [bar_chart("Planned memory by item", bars, "GiB", names)]
    return Section("planned memory at the paper's sizes, item by item", content["text"],
                   [Table("", header, rows)], charts, "planned")  # fmt: skip


def ranks(raw: Any) -> Section | None:
    results = sorted(_measured(raw, "ranks"), key=lambda r: (r["cell"]["strategy"], r["cell"]["ranks"]))
    rows: list[list[Any]] = []
    for r in results:
        cell = r["cell"]
        alone = next((o for o in results if o["cell"]["ranks"] == 1 and o["cell"]["shape"] == cell["shape"]), None)
        rate = median_of(r)
        one = median_of(alone) if alone is not None else None
        efficiency = rate / (one * cell["ranks"]) if rate and one else None
        rows.append([cell["shape"], cell["strategy"], cell["ranks"], r["num_threads"], _spread(r), efficiency,
                     1000 * r["phases"].get("communication", 0.0), _raw(raw, r["name"])])  # fmt: skip
    header = ["shape", "strategy", "ranks", "threads per rank", "tokens/s", "efficiency", "communication ms", "raw"]
    text = "The same global batch on any number of ranks; efficiency is the rate / (ranks x the rate of one rank)."
    charts = [_rate_bars("Ranks: speed", results)] if results else []
    return Section(f"{raw.name}: ranks", text, [Table("", header, rows)], charts) if rows else None


def packing(raw: Any) -> Section | None:
    sets = {}
    for r in raw.cells:
        if r.get("dataset"):
            facts = r["dataset"]
            sets[(r["cell"]["shape"], facts["kind"], facts["row_tokens"])] = (facts, r["name"])
    rows: list[list[Any]] = [
        [facts["kind"], shape, facts["num_documents"], facts["row_tokens"], facts["packed_fill"],
         facts["padded_to_row_fill"], facts["packed_fill"] / facts["padded_to_row_fill"], _raw(raw, name)]
        for (shape, _, _), (facts, name) in sorted(sets.items(), key=lambda item: str(item[0]))
    ]  # fmt: skip
    if not rows:
        return None
    header = ["data", "shape", "documents", "row tokens", "fill, packed", "fill, padded to rows", "ratio", "raw"]
    tables = [Table("Share of slots that hold a token", header, rows)]
    content = raw.others.get("packing")
    if content is not None:
        rates = [
            [f"{entry['num_documents']:,}", entry["row_tokens"], name, float(rate), entry["efficiency"].get(name),
             _raw(raw, "packing")]
            for entry in content["results"]
            for name, rate in entry["documents_per_second"].items()
        ]  # fmt: skip
        tables.append(Table("Packing itself", ["documents", "row tokens", "what", "documents/s", "fill", "raw"], rates))
    return Section(f"{raw.name}: packing against padding", "", tables)


def equal_memory(raw: Any) -> Section | None:
    results = [r for r in raw.cells if r["cell"]["cap_gib"] is not None]
    rows = []
    for r in sorted(results, key=lambda r: (r["cell"]["shape"], r["cell"]["cap_gib"])):
        outcome = _spread(r) if r["status"] == "ok" else out_of_memory(r) if r["status"] == "oom" else r["status"]
        rows.append([r["cell"]["shape"], r["cell"]["cap_gib"], label_of(r), outcome, _raw(raw, r["name"])])
    text = (
        "A smaller card is emulated by an allocator limit, minus the measured context: a real card of that size may "
        "differ by what its driver takes."
    )
    header = ["shape", "cap GiB", "engine", "tokens/s", "raw"]
    return Section(f"{raw.name}: equal memory", text, [Table("", header, rows)]) if rows else None


def quantization(raw: Any) -> Section | None:
    content = raw.others.get("quantization")
    if content is None:
        return None
    tables = []
    for model in content["perplexity"]:
        title = f"Perplexity of {model['model']} on {model['text']} ({model['num_tokens']} tokens), by block size"
        tables.append(_by_block(raw, title, model["results"], "perplexity"))
    for matrix in dict.fromkeys(entry["matrix"] for entry in content["weight_error"]):
        entries = [entry for entry in content["weight_error"] if entry["matrix"] == matrix]
        tables.append(_by_block(raw, f"Relative error of {matrix}, by block size", entries, "relative_error"))
    return Section(f"{raw.name}: quality of the data types", " ".join(findings(content)), tables)


def _by_block(raw: Any, title: str, entries: list[dict[str, Any]], name: str) -> Table:
    """One row per type, one column per block size; types without blocks have one value."""
    blocks = sorted({entry["block"] for entry in entries if entry["block"]})
    at = {(entry["type"], entry["block"]): entry[name] for entry in entries}
    rows = []
    for kind in dict.fromkeys(entry["type"] for entry in entries):
        values = [at.get((kind, block)) for block in blocks]
        rows.append([kind, at.get((kind, None)), *values, _raw(raw, "quantization")])
    return Table(title, ["type", "no blocks", *map(str, blocks), "raw"], rows)


def ceilings(raw: Any) -> Section | None:
    content = raw.others.get("ceilings")
    if content is None:
        return None
    rows = [[e["what"], e["case"], e["value"], e["unit"], _raw(raw, "ceilings")] for e in content["results"]]
    return Section(f"{raw.name}: ceilings", "", [Table("", ["what", "case", "value", "unit", "raw"], rows)])


def roofline(raw: Any) -> Section | None:
    """Predicted micro-steps of every traced shape."""
    names = sorted(name for name, content in raw.others.items() if content.get("benchmark") == "roofline")
    if not names:
        return None
    parts = ("products", "attention", "dequantization", "memory-bound")
    header = ["recipe", "recompute", "ms a layer", "kernels a layer", "KB a token and layer", "MFLOP a token and layer",
              *parts, "ms a micro-step", "tokens/s", "raw"]  # fmt: skip
    tables, charts = [], []
    for name in names:
        content = raw.others[name]
        title = (f"{content['shape']}, {content['tokens']} tokens in documents of {content['document']}, "
                 f"r = {content['rank']}, {content['gpu']}: predicted, not measured")  # fmt: skip
        rows, bars = [], []
        for cell in content["cells"]:
            kinds, step = cell["per_layer_by_kind"], cell["predicted_step"]
            seconds = sum(kinds[part]["seconds"] for part in parts)
            rows.append(
                [cell["recipe"], cell["recompute"], cell["ms_per_layer"], round(cell["kernels_per_layer"]),
                 cell["bytes_per_token"] / 1e3, cell["flops_per_token"] / 1e6,
                 *(f"{kinds[part]['seconds'] / seconds:.0%}" for part in parts),
                 step["ms"], step["tokens_per_second"], _raw(raw, name)]
            )  # fmt: skip
            label = f"{cell['method']}, recompute {cell['recompute']}"
            bars.append(Bar(label, tuple(1000 * kinds[part]["seconds"] for part in parts)))
        tables.append(Table(title, header, rows))
        charts.append(bar_chart(f"{title}, one decoder layer", bars, "ms", parts))
    return Section(
        f"{raw.name}: predicted time of a micro-step", raw.others[names[0]]["text"], tables, charts, "traced"
    )


def not_measured(raw: Any) -> Section | None:
    rows = []
    for r in raw.cells:
        if r["status"] == "oom":
            rows.append([label_of(r), r["cell"]["shape"], out_of_memory(r), _raw(raw, r["name"])])
        elif r["status"] != "ok":
            reason = (r["reason"].strip().splitlines() or [""])[-1][:160]
            rows.append([label_of(r), r["cell"]["shape"], f"{r['status']}: {reason}", _raw(raw, r["name"])])
    header = ["engine", "shape", "what happened", "raw"]
    return Section(f"{raw.name}: not measured", "", [Table("", header, rows)]) if rows else None


ALL = (machine, methods, peers, split, memory_items, planned, ranks, packing, equal_memory, quantization, ceilings,
       roofline, not_measured)  # fmt: skip
