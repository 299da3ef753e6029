"""Every CUDA path once, on a tiny model: minutes that show what fails before a run of hours does.

    python -m benchmarks.gpu.smoke OUT.json [case ...]        exit code 0 when nothing failed, else 1
    python -m benchmarks.gpu.smoke --list

Kernels against references, training runs against a plain run, and the commands that use a trained model. A case reports
separately whether it `ran` to completion and whether its values agree (`agrees`; null: it compared nothing); on a
device that computes nothing only the first can be tested. OUT.json is written after every case.

Cases share one process, since starting one takes longer than most of them. It is supervised: if it dies, hangs or
breaks its CUDA context, the current case has failed and the rest continue in another process. Everything also runs on a
CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
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

CASE_SECONDS = 60.0  # per case, including the start of its process
PROGRAM = (sys.executable, "-m", "benchmarks.gpu.smoke")
BROKEN = 3  # exit code of a process whose CUDA context is unusable


def all_cases() -> dict[str, Any]:
    """Cases by name, in order of value; those that leave a process group behind come last."""
    from . import smoke_kernels, smoke_runs

    return smoke_runs.CASES | smoke_kernels.CASES | smoke_runs.GROUPS | smoke_kernels.GROUPS


# --- the process that runs cases --------------------------------------------------------------------------------------


def run_cases(cases: list[str], work: Path, messages: IO[str]) -> None:
    """Runs cases (none given: all) in this process; reports each start and result as one JSON object per line."""
    import torch

    from .smoke_checks import Bench

    faulthandler.enable()  # if a kernel or library kills the process, the log shows the call
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny tensors: a thread pool costs more than it saves
    bench = Bench(device, work)
    known = all_cases()
    gc.freeze()  # a run collects garbage twice, and would visit every module each time

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    send(
        {
            "known": list(known),
            "provenance": provenance.collect(provenance.this_command("benchmarks.gpu.smoke"), device),
        }
    )
    for name in cases or known:
        send({"begins": name})
        send({"ended": run_case(name, known[name], bench)})
        if not _is_usable(device):
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
    except BaseException as error:  # a library's SystemExit too: the other cases continue
        if isinstance(error, KeyboardInterrupt):
            raise
        found |= {"reason": f"{type(error).__name__}: {error}"[:2000], "trace": traceback.format_exc()[-3000:]}
        traceback.print_exc()
        _free_memory()
    else:
        agrees = all(check.agrees for check in checks) if checks else None
        failed = [_described(check) for check in checks if not check.agrees]
        found |= {"status": "failed" if failed else "ok", "ran": True, "agrees": agrees, "reason": "; ".join(failed)}
        found["checks"] = [check.to_json() for check in checks]
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def _described(check: Any) -> str:
    least = f", at least {check.least:.3g}" if check.least else ""
    return f"{check.what}: {check.value:.3g}, at most {check.tolerance:.3g}{least}"


def _free_memory() -> None:
    """Frees the memory of a failed run. Accelerate's state and a process group stay, as after a successful run:
    Accelerate would mistake the variables that DeepSpeed's group leaves in the environment for a launcher's."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a broken context: `_is_usable` reports it
            torch.cuda.empty_cache()


def _is_usable(device: Any) -> bool:
    """False after a sticky error: an illegal address breaks the context, and every later case would fail."""
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


# --- the supervising process ------------------------------------------------------------------------------------------


class Smoke:
    """Starts processes for the remaining cases, and records the results."""

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
        self.left: list[str] | None = list(cases) or None  # None: all, as listed by the first process
        self.found: list[dict[str, Any]] = []
        self.origin: dict[str, Any] = {}
        self.is_silent, self.patience, self.log_begins = False, case_seconds, 0

    def run(self) -> list[dict[str, Any]]:
        """Returns all results; their file is complete after each case. Raises UserError for an unknown case."""
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
        current: str | None = self.left[0] if self.left else "start"  # also while it imports
        try:
            for message in self._messages(reader):
                if "known" in message:
                    self._begin(message["known"], message["provenance"])
                current = message.get("begins", current)
                if "ended" in message:
                    self._keep(message["ended"])
                    current = None
        finally:
            os.close(reader)
            if not self.is_silent:
                _end(process)
            _kill(process)
        if current is not None:
            how = f"exited with code {process.returncode}"
            if self.is_silent:
                how = f"did not finish in {self.patience:.0f} s"
            self._keep(_not_ended(current, f"its process {how}: {self._last_lines()}"))

    def _begin(self, known: list[str], origin: dict[str, Any]) -> None:
        self.origin = origin
        if self.left is None:
            self.left = known
        if unknown := set(self.left) - set(known):
            raise UserError(f"no case {', '.join(sorted(unknown))}; --list shows all")

    def _messages(self, reader: int) -> Iterator[dict[str, Any]]:
        """Messages until the process closes its end of the pipe, or is silent for too long."""
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

    def _last_lines(self) -> str:
        with self.out.with_suffix(".log").open("rb") as log:
            log.seek(self.log_begins)
            lines = log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-500:]

    def _keep(self, result: dict[str, Any]) -> None:
        self.found.append(result)
        if self.left is None:
            self.left = []  # not even started: there is nothing to continue
        self.left = [name for name in self.left if name != result["name"]]
        content = {"benchmark": "smoke", "provenance": self.origin, "cases": self.found}
        temporary = self.out.with_suffix(".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.rename(self.out)
        seconds = result.get("seconds")
        spent = "" if seconds is None else f"{seconds:6.1f} s"
        print(f"{result['status']:<8}{result['name']:<20}{spent:>9}  {_short(result['reason'])}", flush=True)


def _not_ended(name: str, reason: str, ran_out: bool = False) -> dict[str, Any]:
    status = "not run" if ran_out else "failed"
    return {"name": name, "status": status, "ran": False, "agrees": None, "checks": [], "reason": reason,
            "seconds": None}  # fmt: skip


def _short(reason: str) -> str:
    """The first line: a CUDA error continues with debugging advice."""
    lines = reason.strip().splitlines()
    return lines[0][:160] if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Waits a moment for a process that has sent everything."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and what it started."""
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
    failures = [result for result in results if result["status"] in ("failed", "not run")]
    counts = {status: sum(result["status"] == status for result in results)
              for status in ("ok", "failed", "skipped", "not run")}  # fmt: skip
    lines = [", ".join(f"{count} {status}" for status, count in counts.items() if count)]
    for result in failures:
        kind = "wrong values" if result["ran"] else "incomplete"
        lines.append(f"  {result['name']:<20} {kind:<12} {_short(result['reason'])}")
        frames = [line.strip() for line in result.get("trace", "").splitlines() if line.startswith("  File ")]
        lines += [f"      {frame}" for frame in frames[-2:]]  # where it was raised, and its caller
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--process"]:
        with os.fdopen(int(sys.argv[2]), "w") as messages:
            run_cases(sys.argv[4:], Path(sys.argv[3]), messages)
        os._exit(0)  # the teardown of libraries is not tested
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="the result, JSON; its log is next to it")
    parser.add_argument("cases", nargs="*", help="only these")
    parser.add_argument("--list", action="store_true", help="list all cases")
    parser.add_argument("--seconds", type=float, help="time limit for all cases together")
    parser.add_argument("--case-seconds", type=float, default=CASE_SECONDS, help="time limit per case")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(all_cases()))
        return
    if arguments.out is None:
        parser.error("give the file for the result")
    arguments.out.with_suffix(".log").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the process that runs cases exits with this one
    try:
        results = Smoke(arguments.out, arguments.cases, arguments.seconds, arguments.case_seconds).run()
    except UserError as error:
        parser.error(str(error))
    print(summary(results), flush=True)
    sys.exit(1 if any(result["status"] in ("failed", "not run") for result in results) else 0)


if __name__ == "__main__":
    main()
