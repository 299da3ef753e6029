"""One Slurm job's batch process: starts the launcher, forwards the warning before the time limit, restarts.

    launcher exits because    this process                                          exit code
    the run is finished       exits                                                 0
    USR1 (time limit is near) `scontrol requeue`; the next start resumes            143
    TERM to the steps only    the job is preempted: the same, without waiting       143
    TERM to this process too  scancel, or the end of a grace time: exits            143
    the user's mistake        exits: another attempt would fail the same way        2
    a crash, disk, network    starts the launcher again, with a new rendezvous      93 after three without

Restarts are done here and not by torchrun: with --max-restarts >= 1 its workers read keys of the previous attempt in
the reused store and mostly fail or hang (pytorch #135712, #167288). Nothing is started in a preemption's grace time.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...cluster.stop_signal import StopSignal
from ...config.run_dir import RunDir
from ...errors import printable
from ...files import write_text
from .exit_report import Outcome, read_outcome

MAX_ATTEMPTS = 3  # in a row, without a new checkpoint
NO_PROGRESS_CODE = 93  # by convention: do not requeue
TERMINATED_CODE = 143  # 128 + SIGTERM, a shell's code for a terminated command
MISTAKE_CODE = 2
FORWARD_SECONDS = 5.0  # a process that is still starting loses a signal, so it is sent again
KILL_SECONDS = 300.0  # wait for Slurm's kill after a requeue or a TERM (its KillWait is 30 s by default)
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """The Slurm job whose batch process this is."""

    id: str
    restarts: int  # by Slurm, so far

    def requeue(self) -> str | None:
        """Asks Slurm to start this job again; returns the reason if it refuses."""
        done = _scontrol("requeue", self.id)
        return None if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}")

    def shown(self) -> dict[str, str]:
        """Slurm's record of this job; empty when it does not answer."""
        done = _scontrol("show", "job", "--oneliner", self.id)
        return dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs Slurm's client. Where it is absent (as in many containers) the result is a failure that says so."""
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, "", "scontrol is not on PATH: bind Slurm's client and its files")
    except OSError as error:  # such as one that this user may not execute
        return subprocess.CompletedProcess(words, 126, "", f"scontrol cannot be started: {error}")


def supervise(job: Job, run_dir: Path, command: Sequence[str], stop: StopSignal, resume: str = "auto") -> int:
    """Runs the launcher until the run is finished, the job has to end, or retrying is pointless. Returns the exit code.

    `{id}`, `{port}` and `{outcome}` in the command get new values for each attempt: rendezvous id, port, outcome file.
    `resume`: what the command says of it. Where it is not auto, starts after the first that got anywhere add `--resume
    auto`: they go on, and do not begin once more at the checkpoint that was named.
    """
    run = RunDir(run_dir)
    has_begun = run_dir.parent / f".{run_dir.name}.resumed-{job.id}"
    first = run.newest_step()
    stalled, attempt = 0, 0
    while True:
        before = run.newest_step()
        outcome_file = run_dir.parent / f".{run_dir.name}.outcome-{job.id}-{job.restarts}-{attempt}"
        outcome_file.unlink(missing_ok=True)
        goes_on = ["--resume", "auto"] if resume != "auto" and has_begun.exists() else []
        code = _launch([*_filled(command, job, attempt, outcome_file), *goes_on], stop)
        outcome = read_outcome(outcome_file)
        outcome_file.unlink(missing_ok=True)
        after = run.newest_step()
        if resume != "auto" and after != before:
            has_begun.touch()
        why = f"exit code {code}" if outcome is None else outcome.kind.replace("_", " ")
        if outcome is not None and outcome.text:
            why += f" ({outcome.text.splitlines()[0][:300]})"
        _log(f"job {job.id}, restart {job.restarts}, attempt {attempt}: {why}; newest checkpoint: {before} -> {after}")

        if outcome is not None and outcome.kind == "finished":
            _num_stalled_starts(job, run_dir, is_stalled=False)
            has_begun.unlink(missing_ok=True)
            return 0
        if outcome is not None and outcome.kind == "user_error":
            return MISTAKE_CODE
        if _is_to_end(job, outcome, stop):
            if stop.name == "SIGUSR1" and _num_stalled_starts(job, run_dir, is_stalled=after == first) >= MAX_ATTEMPTS:
                _log(f"{MAX_ATTEMPTS} starts in a row reached the time limit without a new checkpoint: raise --time")
                return NO_PROGRESS_CODE
            return _end(job, stop)
        attempt += 1
        stalled = 0 if after != before else stalled + 1
        if stalled >= MAX_ATTEMPTS:
            _log(
                f"{MAX_ATTEMPTS} attempts in a row ended without a new checkpoint (newest: step {after}); giving up "
                f"with exit code {NO_PROGRESS_CODE}. The errors above name the rank and the cause; lower "
                "train.save_every if it crashes before the first checkpoint"
            )
            return NO_PROGRESS_CODE


def _is_to_end(job: Job, outcome: Outcome | None, stop: StopSignal) -> bool:
    """Whether the job has to end now. After a crash Slurm knows: nothing may be started in a grace time."""
    was_asked = stop.requested or (outcome is not None and outcome.kind == "stopped")
    shown = {} if was_asked else job.shown()
    return was_asked or shown.get("PreemptTime", "None") != "None" or shown.get("JobState", "RUNNING") != "RUNNING"


def _end(job: Job, stop: StopSignal) -> int:
    """Releases the nodes: requeues, unless Slurm is already ending this job (scancel, the end of a preemption)."""
    if stop.name in ("SIGTERM", "SIGINT", "SIGHUP") or job.shown().get("JobState", "RUNNING") != "RUNNING":
        _log("told to end: Slurm requeues the job itself if it was preempted, but not after scancel")
    elif refused := job.requeue():
        _log(f"cannot requeue ({refused}): submit the job again to resume from the checkpoint")
        return TERMINATED_CODE
    else:
        _log("requeued: the next start resumes from the newest checkpoint")
    # Slurm kills this process: exiting on its own would race with the requeue
    deadline = time.monotonic() + KILL_SECONDS
    while stop.name != "SIGTERM" and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return TERMINATED_CODE


def _num_stalled_starts(job: Job, run_dir: Path, is_stalled: bool) -> int:
    """Starts of this job in a row without a new checkpoint, counted in a file next to the run directory."""
    file = run_dir.parent / f".{run_dir.name}.idle-lives-{job.id}"
    if not is_stalled:
        file.unlink(missing_ok=True)
        return 0
    try:
        number = 1 + int(file.read_text())
    except (OSError, ValueError):
        number = 1
    write_text(file, str(number))
    return number


def _launch(command: list[str], stop: StopSignal) -> int:
    """Runs the launcher until it exits. SIGUSR1 is forwarded; Slurm itself sends SIGTERM to the steps."""
    with subprocess.Popen(command) as launcher:
        forwarded = -math.inf
        while launcher.poll() is None:
            if stop.name == "SIGUSR1" and time.monotonic() - forwarded >= FORWARD_SECONDS:
                launcher.send_signal(signal.SIGUSR1)
                forwarded = time.monotonic()
            time.sleep(POLL_SECONDS)
        return launcher.returncode


def _filled(command: Sequence[str], job: Job, attempt: int, outcome: Path) -> list[str]:
    number = int("".join(filter(str.isdigit, job.id)) or 0)
    values = {
        "{id}": f"{job.id}-{job.restarts}-{attempt}",
        "{port}": str(20000 + (number * 7 + job.restarts * 3 + attempt) % 10000),
        "{outcome}": str(outcome),
    }
    filled = list(command)
    for name, value in values.items():
        filled = [part.replace(name, value) for part in filled]
    return filled


def _log(text: str) -> None:
    print(printable(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervise: {text}"), file=sys.stderr, flush=True)
