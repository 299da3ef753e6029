"""The queue: runs what has no result for this code yet. Items are isolated: a crash, a hang or a missing module in one
does not affect the others.

This process never touches CUDA (see `machine`). It can be stopped at any moment: a stop signal ends the running item,
which is recorded as cut, and what was written is packed. An item dies with this process, even if that is killed, so
that no GPU stays occupied. A cut item runs again.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_dist.errors import UserError

from .. import provenance
from .items import ITEMS, LATER, Item
from .machine import machine
from .pack import pack

EARLIER = provenance.ROOT / "benchmarks" / "results" / "gpu-queue"  # results that were fetched and committed
MARGIN_SECONDS = 20  # to end an item, write its result and pack before the time is up
TAIL_LINES, TAIL_WIDTH = 25, 160  # for the terminal: the log of an item that is not done
_PR_SET_PDEATHSIG = 1  # Linux


class Cut(BaseException):
    """This process received a stop signal."""


def scratch_of(out: Path) -> Path:
    """Folder next to OUT for models and data that items share; not a result."""
    return out.with_name(f"{out.name}-scratch")


def lacks(item: Item) -> str | None:
    """What this machine lacks for an item; None if it can run."""
    gpus = machine().gpu_bytes if item.device == "cuda" else ()
    if item.device == "cuda" and not gpus:
        return "needs a CUDA device"
    if item.device == "cuda" and len(gpus) < item.gpus:
        return f"needs {item.gpus} GPUs, this machine has {len(gpus)}"
    if item.device_gib and gpus[0] < item.device_gib * 2**30:
        return f"needs a GPU with {item.device_gib} GiB"
    absent = [name for name in item.needs if importlib.util.find_spec(name) is None]
    if absent:
        return f"lacks the modules {', '.join(absent)} (install them, or supply them as wheels)"
    parts = shlex.split(item.command)
    if "-m" in parts and parts[parts.index("-m") + 1].startswith("benchmarks."):
        module = parts[parts.index("-m") + 1]
        if importlib.util.find_spec(module) is None:
            return f"{module} is not part of this checkout"
    return None


def result_of(item: Item, out: Path, code: str) -> dict[str, Any] | None:
    """The item's result for this code and command, in OUT or among committed ones; None if there is none."""
    for folder in (out, EARLIER):
        try:
            found: dict[str, Any] = json.loads((folder / f"{item.name}.json").read_text())
        except (OSError, ValueError):
            continue
        if found["code_hash"] == code and found["command"] == item.command:
            return found
    return None


def run_item(item: Item, out: Path, code: str, seconds: float) -> dict[str, Any]:
    """Runs one item for at most `seconds`; writes OUT/<name>.json and its log, the item itself writes to OUT/<name>/.

    Re-raises Cut and KeyboardInterrupt after the result is written.
    """
    folder, log = out / item.name, out / f"{item.name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    scratch = scratch_of(out).resolve()
    command = item.command.format(out=shlex.quote(str(folder.resolve())), scratch=shlex.quote(str(scratch)))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    origin = {**machine().origin, "command": command, "date": now}
    started = time.monotonic()
    with log.open("w") as stream:
        process = _start(command, stream)
        exit_code, cut = _wait(process, seconds)
    status = "done" if exit_code == 0 else "failed"
    if exit_code is None:  # cut: it had less than its full time
        status = "cut" if cut is not None or seconds < item.seconds else "timeout"
    result = {
        "name": item.name,
        "status": status,
        "exit_code": exit_code,
        "seconds": round(time.monotonic() - started, 1),
        "estimate_seconds": item.estimate,
        "limit_seconds": round(seconds, 1),
        "command": item.command,
        "code_hash": code,
        "provenance": origin,
        "files": sorted(str(path.relative_to(out)) for path in folder.rglob("*") if path.is_file()),
        "tail": log.read_text(errors="replace")[-4000:],
    }
    temporary = out / f".{item.name}.part"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.rename(out / f"{item.name}.json")
    if cut is not None:
        raise cut
    return result


def _start(command: str, stream: Any) -> subprocess.Popen[bytes]:
    arguments = shlex.split(command)
    arguments[0] = sys.executable if arguments[0] == "python" else arguments[0]
    paths = [str(provenance.ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(
        arguments, cwd=provenance.ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=end_with_parent,
    )  # fmt: skip


def _wait(process: subprocess.Popen[bytes], seconds: float) -> tuple[int | None, BaseException | None]:
    """(exit code, or None if it had to be stopped; the signal's exception if this process was stopped)."""
    try:
        return process.wait(seconds), None
    except subprocess.TimeoutExpired:
        return None, None
    except (Cut, KeyboardInterrupt) as cut:
        return None, cut
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the item and every process it started; only then is the GPU's memory free for the next."""
    try:
        os.killpg(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        process.wait()


def run(
    items: Sequence[Item],
    out: Path,
    seconds: float | None = None,
    retry: bool = False,
    after_each: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Runs the items without a result, in order. `seconds`: an item starts only if at least half of its limit is left.

    retry: also runs items that failed or timed out with this code, after those that were never tried. `after_each` is
    called after each item: what it writes is kept even if this process is killed.
    """
    out.mkdir(parents=True, exist_ok=True)
    code = provenance.code_hash()
    ends = None if seconds is None else time.monotonic() + seconds - MARGIN_SECONDS
    states = {item.name: (result_of(item, out, code) or {"status": None})["status"] for item in items}
    fresh = [item for item in items if states[item.name] in (None, "cut")]
    unfinished = [item for item in items if states[item.name] == "timeout" and (item.resumes or retry)]
    broken = [item for item in items if states[item.name] == "failed" and retry]
    results = []
    for item in [*fresh, *unfinished, *broken]:
        if reason := lacks(item):
            print(f"{item.name}: skipped, {reason}", flush=True)
            continue
        limit = float(item.seconds) if ends is None else min(float(item.seconds), ends - time.monotonic())
        if limit < item.seconds / 2:
            print(f"{item.name}: left for another run, {max(0.0, limit):.0f} s left of {item.seconds} s", flush=True)
            continue
        print(f"{item.name}: {item.why} (about {item.estimate} s, at most {limit:.0f} s)", flush=True)
        results.append(run_item(item, out, code, limit))
        print(f"{item.name}: {results[-1]['status']} in {results[-1]['seconds']} s", flush=True)
        if results[-1]["status"] != "done":
            tail = results[-1]["tail"].splitlines()[-TAIL_LINES:]
            print("\n".join(f"    {line[:TAIL_WIDTH]}" for line in tail), flush=True)
        after_each()
    return results


def status(items: Sequence[Item], out: Path) -> list[tuple[str, str, str]]:
    """(name, state, detail) of every item: done, failed, timeout, cut or unmeasured."""
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
        detail = item.why + ("; has a result from other code" if old else "") + (f"; {reason}" if reason else "")
        lines.append((item.name, "unmeasured", detail))
    return lines


def main(words: list[str] | None = None) -> None:
    """Exit code of `run`: 0 if every started item is done, 1 if not, 143 after a stop signal."""
    arguments = _parse(words)
    if arguments.action == "calibrate":
        from .calibrate import calibrate

        try:
            calibrate(arguments.out)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        return
    items = [item for item in ITEMS if arguments.only in item.name and arguments.part in (None, item.part)]
    if arguments.action == "status":
        _print_status(items, arguments.out)
        return
    signal.signal(signal.SIGTERM, _cut)

    def pack_results() -> None:
        if arguments.pack is not None:
            pack(arguments.out, arguments.pack)

    try:
        results = run(items, arguments.out, arguments.seconds, arguments.retry, pack_results)
    except (Cut, KeyboardInterrupt):
        print("stopped by a signal; run the same command to continue", flush=True)
        sys.exit(143)
    finally:
        pack_results()
    _print_status(items, arguments.out)
    sys.exit(0 if all(result["status"] == "done" for result in results) else 1)


def _print_status(items: Sequence[Item], out: Path) -> None:
    print(f"code {provenance.code_hash()}")
    for item, (name, state, detail) in zip(items, status(items, out)):
        part = "later" if item.part == LATER else f"part {item.part}"
        print(f"{state:<11} {part:<7} {name:<18} {item.estimate:>5} s  {detail}", flush=True)


def _cut(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only once: the rest shuts down in order
    raise Cut


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("action", choices=("status", "run", "calibrate"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("build/gpu"))
    parser.add_argument("--seconds", type=float, help="run: time left on this machine")
    parser.add_argument("--part", type=int, choices=(1, 2, 3, LATER), help=f"only this part; {LATER}: the rest")
    parser.add_argument("--retry", action="store_true", help="run: also repeat failed and timed-out items")
    parser.add_argument("--only", default="", help="only items whose name contains this")
    parser.add_argument("--pack", type=Path, metavar="TGZ", help="run: archive all results after each item")
    return parser.parse_args(words)
