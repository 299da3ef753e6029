"""The page of one run, or of several laid over each other: what to show, from what their directories hold."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import GIB, format_bytes, write_text
from .curves import HELD_OUT, KEYS, LIMIT, is_number
from .render import SCRIPTS, render
from .run_files import RunFiles

CHARTS = (  # key, title, unit
    ("loss", "Loss", "mean NLL of a label"),
    ("lr", "Learning rate", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_second", "Tokens per second", "all ranks"),
    ("peak_bytes", "Peak memory", "GiB, rank 0"),
    ("imbalance", "Imbalance over ranks", "busiest rank's work / mean"),
)
KINDS = {"finished": "finished", "stopped": "stopped", "failed": "failed"}


def write_report(runs: Sequence[RunFiles], file: Path, *, is_running: bool = False) -> None:
    """Writes the page atomically. `is_running`: the one run draws its own page. Raises OSError."""
    write_text(file, report(runs, is_running=is_running))


def report(runs: Sequence[RunFiles], *, is_running: bool = False) -> str:
    """The page as HTML."""
    names = _distinct_names(runs)
    views = [_view(run, name, is_running) for run, name in zip(runs, names, strict=True)]
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    data = {
        "runs": [_series(run, name) for run, name in zip(runs, names, strict=True)],
        "charts": [{"key": key, "title": title, "unit": unit} for key, title, unit in CHARTS],
    }
    return render(
        "report.html",
        scripts=SCRIPTS,
        title=title,
        drawn=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        is_running=is_running,
        runs=views,
        facts=[fact for fact, _ in views[0]["facts"]],
        differences=_differences(runs),
        data=data,
        widths=[(view["name"], run.curves.steps.width) for view, run in zip(views, runs)],
        limit=LIMIT,
    )


def _distinct_names(runs: Sequence[RunFiles]) -> list[str]:
    """Names of the folders, with the folder above where two have the same, with a number where that is not enough."""
    names = [run.name for run in runs]
    twice = {name for name, number in Counter(names).items() if number > 1}
    names = [f"{run.path.resolve().parent.name}/{name}" if name in twice else name for run, name in zip(runs, names)]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]


def _series(run: RunFiles, name: str) -> dict[str, Any]:
    steps = run.curves.steps.to_json(KEYS)
    if "peak_bytes" in steps:
        memory = steps["peak_bytes"]
        for part, values in memory.items():
            memory[part] = [value and round(value / GIB, 3) for value in values]
    planned = _planned(run)
    return {
        "name": name,
        "steps": steps,
        "held_out": run.curves.held_out.to_json(HELD_OUT),
        "restarts": [start["step"] for start in _starts(run) if _is_count(start.get("step")) and start["step"]],
        "planned": None if planned is None else {"peak_bytes": round(planned / GIB, 3)},
    }


# --- what is shown of one run -----------------------------------------------------------------------------------------


def _view(run: RunFiles, name: str, is_running: bool) -> dict[str, Any]:
    starts = _starts(run)
    newest = starts[-1] if starts else {}
    return {
        "name": name,
        "path": str(run.path),
        "facts": _facts(run, is_running),
        "samples": run.samples,
        "plan": _plan_rows(newest),
        "plan_text": _plan_text(run, newest),
        "events": _events(run, is_running),
        "said": str(newest.get("said", "")),
        "checkpoints": run.checkpoints,
        "set_aside": run.set_aside,
        "num_damaged": run.num_damaged,
        "config": run.config,
        "summary": [(key, _plain(value)) for key, value in run.summary.items()],
    }


def _facts(run: RunFiles, is_running: bool) -> list[tuple[str, str]]:
    """(what, value), the same rows for every run."""
    curves, last, summary = run.curves, run.curves.last, run.summary
    best = "–" if curves.best is None else f"{curves.best[0]:.4f} at step {curves.best[1]:,}"
    peak = _number(summary.get("peak_bytes_max")) or _number(last.get("peak_bytes"))
    planned = _planned(run)
    memory = "–" if peak is None else format_bytes(peak)
    if peak is not None and planned is not None:
        memory += f" (planned {format_bytes(planned)}, {planned / peak - 1:+.1%})"
    start = _starts(run)[-1] if _starts(run) else {}
    ranks = _number(start.get("world_size")) or _number(summary.get("world_size"))
    device = str(start.get("device") or summary.get("device") or "")
    return [
        ("state", _state(run, is_running)),
        ("step", _progress(run)),
        ("loss", _four(last.get("loss"))),
        ("held-out loss", _four(last.get("eval_loss"))),
        ("lowest held-out loss", best),
        ("tokens per second", _thousands(summary.get("tokens_per_second_median") or last.get("tokens_per_second"))),
        ("peak memory", memory),
        ("tokens trained on", _thousands(curves.tokens or None)),
        ("time in steps", _hours(curves.seconds)),
        ("ranks", "–" if ranks is None else f"{ranks:.0f} × {device}" if device else f"{ranks:.0f}"),
        ("starts", f"{len(_starts(run))}" if run.history else "–"),
    ]


def _state(run: RunFiles, is_running: bool) -> str:
    if is_running and (not run.history or run.history[-1]["event"] == "start"):
        return "running"
    if run.is_finished or (run.history and run.history[-1].get("kind") == "finished"):
        return "finished"
    if not run.history:
        return "not finished"
    last = run.history[-1]
    if last["event"] == "start":
        return "running, or killed"
    return KINDS.get(str(last.get("kind")), "ended")


def _progress(run: RunFiles) -> str:
    step = _number(run.curves.last.get("step")) or 0
    planned = [number for start in _starts(run) if (number := _number(start.get("num_steps")))]
    return f"{step:,.0f} of {planned[-1]:,.0f}" if planned else f"{step:,.0f}"


def _events(run: RunFiles, is_running: bool) -> list[dict[str, str]]:
    """One row for each start, with how it ended."""
    rows: list[dict[str, str]] = []
    for event in run.history:
        step = _thousands(event.get("step"))
        if event["event"] == "start":
            rows.append(
                {
                    "from": _moment(event),
                    "step": step,
                    "where": f"{event.get('world_size', '?')} × {event.get('device', '?')}, {event.get('host', '?')}",
                    "to": "",
                    "end_step": "",
                    "how": "no end was written: killed, or its machine was lost",
                }
            )
        elif rows:
            text = str(event.get("text", ""))
            how = KINDS.get(str(event.get("kind")), "ended") + (f": {text}" if text else "")
            rows[-1] |= {"to": _moment(event), "end_step": step, "how": how}
    if rows and run.history[-1]["event"] == "start":
        rows[-1]["how"] = "running" if is_running else "no end yet: it runs, or was killed"
    return rows


def _moment(event: dict[str, Any]) -> str:
    """2026-01-31 12:00:00 UTC: of whatever host, they compare."""
    return str(event.get("time", "")).replace("T", " ").replace("+00:00", " UTC")


def _starts(run: RunFiles) -> list[dict[str, Any]]:
    return [event for event in run.history if event["event"] == "start"]


# --- memory -----------------------------------------------------------------------------------------------------------


def _planned(run: RunFiles) -> float | None:
    """Bytes of tensors by the plan, where it is of the device that was measured: a GPU."""
    start = _starts(run)[-1] if _starts(run) else {}
    if start.get("device_type") == "cuda":
        return _number(_dict(start.get("plan")).get("tensor_bytes"))
    if _number(run.summary.get("plan_error")) is not None:  # of a version without a history
        return _number(run.summary.get("planned_peak_bytes"))
    return None


def _plan_rows(start: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(item, size, what it is), the largest first."""
    plan = _dict(start.get("plan"))
    sizes = {str(name): size for name, value in _dict(plan.get("items")).items() if (size := _number(value))}
    notes = _dict(plan.get("notes"))
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [(name, format_bytes(size), str(notes.get(name, ""))) for name, size in ordered]


def _plan_text(run: RunFiles, start: dict[str, Any]) -> str:
    plan = _dict(start.get("plan"))
    total, tensors = _number(plan.get("peak_bytes")), _number(plan.get("tensor_bytes"))
    if total is None or tensors is None:
        return ""
    text = (
        f"Planned for one rank on a GPU: {format_bytes(total)} at the peak ({plan.get('peak_at', '')}), "
        f"{format_bytes(tensors)} of it tensors."
    )
    if start.get("device_type") != "cuda":
        return f"{text} This start ran on a CPU, whose peak is that of the whole process: the two do not compare."
    return text


# --- several runs -----------------------------------------------------------------------------------------------------


def _differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """The config keys in which the runs differ, each with the value of every run."""
    if len(runs) < 2:
        return []
    leaves = [run.leaves() for run in runs]
    keys = sorted({key for one in leaves for key in one} - {"run_dir"})
    rows = [(key, [_plain(one.get(key)) for one in leaves]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


# --- values -----------------------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    return value if is_number(value) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _four(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:.4f}"


def _thousands(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:,.0f}"


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if seconds else "–"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if type(value) is int else str(value)
