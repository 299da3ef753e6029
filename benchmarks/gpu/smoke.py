"""Every CUDA path once, on a tiny model: minutes that say what does not work before hours that need it.

    python -m benchmarks.gpu.smoke OUT.json [case ...]        exit code 0 when nothing failed, else 1
    python -m benchmarks.gpu.smoke --list

Kernels beside references, training runs beside a plain one, the commands that take what was trained. A case says
apart whether it `ran` to its end and whether its values `agree` (null: it compared nothing): on a device that computes
nothing the first is what can be rehearsed. OUT.json is written after every case.

Cases share one process, since starting one takes longer than most of them. It is watched: where it dies, hangs, or its
CUDA context is broken, the case at work has failed and the rest go on in another process. On a CPU everything runs too.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qlora_dist.errors import UserError

from .. import provenance

CASE_SECONDS = 60.0  # of one case, the start of its process included
PROGRAM = (sys.executable, "-m", "benchmarks.gpu.smoke")
BROKEN = 3  # exit code of a process whose CUDA context takes no more work


def all_cases() -> dict[str, Any]:
    """By name, in order of value; those that leave a process group behind come last."""
    from . import smoke_kernels, smoke_runs

    return smoke_runs.CASES | smoke_kernels.CASES | smoke_runs.GROUPS | smoke_kernels.GROUPS


# --- the process that runs cases --------------------------------------------------------------------------------------


def work_through(cases: list[str], work: Path, say: IO[str]) -> None:
    """Runs cases (none named: all) in this process; says what begins and how it ended, a JSON object a line."""
    import torch

    from .smoke_checks import Bench

    faulthandler.enable()  # where a kernel or library ends the process, the log says at which call
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny tensors: a thread pool costs more than it gives
    bench = Bench(device, work)
    every = all_cases()

    def tell(message: dict[str, Any]) -> None:
        say.write(json.dumps(message) + "\n")
        say.flush()

    tell(
        {
            "known": list(every),
            "provenance": provenance.collect(provenance.this_command("benchmarks.gpu.smoke"), device),
        }
    )
    for name in cases or every:
        tell({"begins": name})
        tell({"ended": run_case(name, every[name], bench)})
        if not _takes_work(device):
            sys.exit(BROKEN)


def run_case(name: str, case: Any, bench: Any) -> dict[str, Any]:
    """One entry of the result."""
    from .smoke_checks import Skip

    started = time.perf_counter()
    found: dict[str, Any] = {"name": name, "status": "failed", "ran": False, "agrees": None, "checks": [], "reason": ""}
    try:
        checks = case(bench)
    except Skip as reason:
        found |= {"status": "skipped", "reason": str(reason)}
    except BaseException as error:  # SystemExit of a library too: the others go on
        if isinstance(error, KeyboardInterrupt):
            raise
        found |= {"reason": f"{type(error).__name__}: {error}"[:2000], "trace": traceback.format_exc()[-3000:]}
        traceback.print_exc()
        _clear_up()
    else:
        agrees = all(check.agrees for check in checks) if checks else None
        wrong = [_judged(check) for check in checks if not check.agrees]
        found |= {"status": "failed" if wrong else "ok", "ran": True, "agrees": agrees, "reason": "; ".join(wrong)}
        found["checks"] = [check.to_json() for check in checks]
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def _judged(check: Any) -> str:
    least = f", at least {check.least:.3g}" if check.least else ""
    return f"{check.what}: {check.value:.3g}, at most {check.tolerance:.3g}{least}"


def _clear_up() -> None:
    """Memory of a run that failed. Accelerate's state and a process group stay, as after a run that did not fail:
    Accelerate would take what DeepSpeed's group left in the environment for a launcher's."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a broken context: `_takes_work` says so
            torch.cuda.empty_cache()


def _takes_work(device: Any) -> bool:
    """False after an error that stays: an illegal address ends a context, and every case after it would fail."""
    import torch

    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        print(f"the CUDA context is broken: {error}", file=sys.stderr)
        return False
    return True


# --- the process that watches -----------------------------------------------------------------------------------------


class Smoke:
    """Starts processes for the cases that are left, and keeps the result."""

    def __init__(
        self,
        out: Path,
        cases: list[str],
        seconds: float | None = None,
        case_seconds: float = CASE_SECONDS,
        program: tuple[str, ...] = PROGRAM,
    ) -> None:
        self.out, self.case_seconds, self.program = out, case_seconds, program
        self.ends = float("inf") if seconds is None else time.monotonic() + seconds
        self.left: list[str] | None = list(cases) or None  # None: all, which the first process names
        self.found: list[dict[str, Any]] = []
        self.origin: dict[str, Any] = {}
        self.is_silent, self.patience, self.log_begins = False, case_seconds, 0

    def run(self) -> list[dict[str, Any]]:
        """All results. Their file is whole after each of them. Raises UserError for a case that is not known."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="smoke-"))
        try:
            while self.left != [] and time.monotonic() < self.ends:
                self._one_process(work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        for name in self.left or []:
            self._keep(_not_ended(name, "no time was left for it", ran_out=True))
        return self.found

    def _one_process(self, work: Path) -> None:
        reader, writer = os.pipe()
        command = [*self.program, "--process", str(writer), str(work), *(self.left or [])]
        with self.out.with_suffix(".log").open("a") as log:
            self.log_begins = log.tell()
            process = subprocess.Popen(
                command, cwd=provenance.ROOT, env=_environment(), stdout=log, stderr=subprocess.STDOUT,
                pass_fds=(writer,), start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        at_work: str | None = self.left[0] if self.left else "start"  # also while it imports
        try:
            for message in self._messages(reader):
                if "known" in message:
                    self._begin(message["known"], message["provenance"])
                at_work = message.get("begins", at_work)
                if "ended" in message:
                    self._keep(message["ended"])
                    at_work = None
        finally:
            os.close(reader)
            if not self.is_silent:
                _end(process)
            _kill(process)
        if at_work is not None:
            how = f"ended with code {process.returncode}"
            if self.is_silent:
                how = f"did not end in {self.patience:.0f} s"
            self._keep(_not_ended(at_work, f"its process {how}: {self._last_words()}"))

    def _begin(self, known: list[str], origin: dict[str, Any]) -> None:
        self.origin = origin
        if self.left is None:
            self.left = known
        if unknown := set(self.left) - set(known):
            raise UserError(f"no case {', '.join(sorted(unknown))}; --list names all")

    def _messages(self, reader: int) -> Iterator[dict[str, Any]]:
        """Until the process closes its end, or is silent for too long."""
        rest, self.is_silent = b"", False
        while True:
            self.patience = max(0.0, min(self.case_seconds, self.ends - time.monotonic()))
            if not select.select([reader], [], [], self.patience)[0]:
                self.is_silent = True
                return
            piece = os.read(reader, 1 << 16)
            if not piece:
                return
            *lines, rest = (rest + piece).split(b"\n")
            yield from (json.loads(line) for line in lines)

    def _last_words(self) -> str:
        with self.out.with_suffix(".log").open("rb") as log:
            log.seek(self.log_begins)
            lines = log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-500:]

    def _keep(self, result: dict[str, Any]) -> None:
        self.found.append(result)
        if self.left is None:
            self.left = []  # not even started: there is nothing to go on with
        self.left = [name for name in self.left if name != result["name"]]
        content = {"benchmark": "smoke", "provenance": self.origin, "cases": self.found}
        aside = self.out.with_suffix(".part")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        aside.rename(self.out)
        seconds = result.get("seconds")
        spent = "" if seconds is None else f"{seconds:6.1f} s"
        print(f"{result['status']:<8}{result['name']:<20}{spent:>9}  {_short(result['reason'])}", flush=True)


def _not_ended(name: str, reason: str, ran_out: bool = False) -> dict[str, Any]:
    status = "not run" if ran_out else "failed"
    return {"name": name, "status": status, "ran": False, "agrees": None, "checks": [], "reason": reason,
            "seconds": None}  # fmt: skip


def _short(reason: str) -> str:
    """The first line: a CUDA error goes on with advice for its debugging."""
    lines = reason.strip().splitlines()
    return lines[0][:160] if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Waits a moment for a process that has said all."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    paths = [str(provenance.ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }  # fmt: skip


def summary(results: list[dict[str, Any]]) -> str:
    """Counts, and a table of the failures."""
    wrong = [result for result in results if result["status"] in ("failed", "not run")]
    counts = {status: sum(result["status"] == status for result in results)
              for status in ("ok", "failed", "skipped", "not run")}  # fmt: skip
    lines = [", ".join(f"{count} {status}" for status, count in counts.items() if count)]
    for result in wrong:
        kind = "values" if result["ran"] else "did not end"
        lines.append(f"  {result['name']:<20} {kind:<12} {_short(result['reason'])}")
        frames = [line.strip() for line in result.get("trace", "").splitlines() if line.startswith("  File ")]
        lines += [f"      {frame}" for frame in frames[-2:]]  # where it was raised, and from where
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--process"]:
        with os.fdopen(int(sys.argv[2]), "w") as say:
            work_through(sys.argv[4:], Path(sys.argv[3]), say)
        os._exit(0)  # what libraries tear down after the last case is no part of it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="the result, JSON; its log is beside it")
    parser.add_argument("cases", nargs="*", help="only these")
    parser.add_argument("--list", action="store_true", help="name all cases")
    parser.add_argument("--seconds", type=float, help="no case starts or goes on after them")
    parser.add_argument("--case-seconds", type=float, default=CASE_SECONDS, help="longest time of one case")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(all_cases()))
        return
    if arguments.out is None:
        parser.error("name the file of the result")
    arguments.out.with_suffix(".log").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the process of the cases ends with this one
    try:
        results = Smoke(arguments.out, arguments.cases, arguments.seconds, arguments.case_seconds).run()
    except UserError as error:
        parser.error(str(error))
    print(summary(results), flush=True)
    sys.exit(1 if any(result["status"] in ("failed", "not run") for result in results) else 0)


if __name__ == "__main__":
    main()
