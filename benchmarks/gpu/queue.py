"""The queue: runs what has no result for this code yet. Items end alone: a crash, a hang, a missing module of one
leaves the others untouched."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import provenance
from .items import ITEMS, Item

EARLIER = provenance.ROOT / "benchmarks" / "results" / "gpu-queue"  # results that were brought home and committed
SCRATCH = provenance.ROOT / "build" / "gpu-scratch"  # models and data that items share; not a result
MARGIN_SECONDS = 15  # for ending an item and writing its result before a loan is over


def lacks(item: Item) -> str | None:
    """What this machine has not got for an item; None when it can run."""
    if item.device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    if item.device == "cuda" and torch.cuda.device_count() < item.gpus:
        return f"needs {item.gpus} GPUs, this machine shows {torch.cuda.device_count()}"
    if item.device_gib and torch.cuda.mem_get_info()[1] < item.device_gib * 2**30:
        return f"needs a GPU of {item.device_gib} GiB"
    absent = [name for name in item.needs if importlib.util.find_spec(name) is None]
    if absent:
        return f"lacks the modules {', '.join(absent)} (install them, or bring them as wheels)"
    parts = shlex.split(item.command)
    if "-m" in parts and parts[parts.index("-m") + 1].startswith("benchmarks."):
        module = parts[parts.index("-m") + 1]
        if importlib.util.find_spec(module) is None:
            return f"{module} is not part of this checkout"
    return None


def result_of(item: Item, out: Path, code: str) -> dict[str, Any] | None:
    """The item's result for this code and command, in OUT or among committed ones; None when there is none."""
    for folder in (out, EARLIER):
        try:
            found: dict[str, Any] = json.loads((folder / f"{item.name}.json").read_text())
        except (OSError, ValueError):
            continue
        if found["code_hash"] == code and found["command"] == item.command:
            return found
    return None


def run_item(item: Item, out: Path, code: str, seconds: float) -> dict[str, Any]:
    """Runs one item for at most `seconds` and writes OUT/<name>.json, its log and what it leaves in OUT/<name>/."""
    folder, log = out / item.name, out / f"{item.name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    command = item.command.format(out=shlex.quote(str(folder.resolve())), scratch=shlex.quote(str(SCRATCH)))
    arguments = shlex.split(command)
    arguments[0] = sys.executable if arguments[0] == "python" else arguments[0]
    started = time.monotonic()
    origin = provenance.collect(command, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(provenance.ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with log.open("w") as stream:
        process = subprocess.Popen(
            arguments, cwd=provenance.ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code_of_exit: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code_of_exit = None
        finally:
            _end_group(process)
    status = "timeout" if code_of_exit is None else "done" if code_of_exit == 0 else "failed"
    result = {
        "name": item.name,
        "status": status,
        "exit_code": code_of_exit,
        "seconds": round(time.monotonic() - started, 1),
        "limit_seconds": seconds,
        "command": item.command,
        "code_hash": code,
        "provenance": origin,
        "files": sorted(str(path.relative_to(out)) for path in folder.rglob("*") if path.is_file()),
        "tail": log.read_text(errors="replace")[-4000:],
    }
    aside = out / f".{item.name}.json"
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.rename(out / f"{item.name}.json")
    return result


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """The item and every process it started; a GPU's memory is free for the next only then."""
    try:
        os.killpg(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        process.wait()


def run(items: Sequence[Item], out: Path, seconds: float | None = None, retry: bool = False) -> list[dict[str, Any]]:
    """Runs the items without a result, in order. `seconds`: no item starts that could not have half of its limit.

    retry: items that failed or ran out of time for this code, too, after those that were never tried.
    """
    out.mkdir(parents=True, exist_ok=True)
    code = provenance.code_hash()
    ends = None if seconds is None else time.monotonic() + seconds - MARGIN_SECONDS
    states = {item.name: (result_of(item, out, code) or {"status": None})["status"] for item in items}
    fresh = [item for item in items if states[item.name] is None]
    unfinished = [item for item in items if states[item.name] == "timeout" and (item.resumes or retry)]
    broken = [item for item in items if states[item.name] == "failed" and retry]
    results = []
    for item in [*fresh, *unfinished, *broken]:
        if reason := lacks(item):
            print(f"{item.name}: skipped, {reason}", flush=True)
            continue
        limit = float(item.seconds) if ends is None else min(float(item.seconds), ends - time.monotonic())
        if limit < item.seconds / 2:
            print(f"{item.name}: left for another run, {max(0.0, limit):.0f} s are left of {item.seconds}", flush=True)
            continue
        print(f"{item.name}: {item.why} (at most {limit:.0f} s)", flush=True)
        results.append(run_item(item, out, code, limit))
        print(f"{item.name}: {results[-1]['status']} in {results[-1]['seconds']} s", flush=True)
    return results


def status(items: Sequence[Item], out: Path) -> list[tuple[str, str, str]]:
    """(name, state, detail) of every item: done, failed, timeout, unmeasured, or what it waits for."""
    code = provenance.code_hash()
    lines = []
    for item in items:
        result = result_of(item, out, code)
        if result is not None:
            detail = f"{result['seconds']} s, {len(result['files'])} files"
            lines.append((item.name, result["status"], detail))
            continue
        old = (out / f"{item.name}.json").exists()
        reason = lacks(item)
        detail = item.why + ("; has a result of other code" if old else "") + (f"; {reason}" if reason else "")
        lines.append((item.name, "unmeasured", detail))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("action", choices=("status", "run"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("build/gpu"))
    parser.add_argument("--seconds", type=float, help="time that is left on this machine")
    parser.add_argument("--retry", action="store_true", help="run failed and timed-out items again")
    parser.add_argument("--only", default="", help="only items whose name contains this")
    arguments = parser.parse_args()
    items = [item for item in ITEMS if arguments.only in item.name]
    if arguments.action == "run":
        run(items, arguments.out, arguments.seconds, arguments.retry)
        return
    print(f"code {provenance.code_hash()}")
    for name, state, detail in status(items, arguments.out):
        print(f"{state:<11} {name:<18} {detail}")
