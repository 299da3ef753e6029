"""One Slurm job's batch process: starts the launcher, forwards the warning before the time limit, starts again.

    launcher ends because     this process                                          exit code
    the run is finished       ends                                                  0
    USR1 (time limit is near) `scontrol requeue`; the next life goes on             143
    TERM to the steps only    the job is preempted: the same, without waiting       143
    TERM to this process too  scancel, or the end of a grace time: only ends        143
    the user's mistake        ends: another try would find the same                 2
    a crash                   starts the launcher again, with a new rendezvous      93 after three without

Restarts are made here and not by torchrun: with --max-restarts >= 1 its workers read keys of the last attempt in the
reused store and mostly fail or hang (pytorch #135712, #167288). Nothing starts within a preemption's grace time.
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
from ...files import write_text
from .exit_report import Outcome, read_outcome

MAX_TRIES = 3  # without a new checkpoint
NO_PROGRESS_CODE = 93  # by convention: do not requeue
TERMINATED_CODE = 143  # 128 + SIGTERM, what a shell says of a terminated command
MISTAKE_CODE = 2
FORWARD_SECONDS = 5.0  # a process that is still being started loses a signal, so it is sent again
KILL_SECONDS = 300.0  # to be killed by Slurm after a requeue or a TERM (its KillWait is 30 s by default)
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """The Slurm job that this process is the batch process of."""

    id: str
    life: int  # how often Slurm has started it before

    def requeue(self) -> str | None:
        """Asks Slurm to start this job again; what it says when it refuses."""
        done = _scontrol("requeue", self.id)
        return None if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}")

    def shown(self) -> dict[str, str]:
        """What Slurm says of this job; nothing when it does not answer."""
        done = _scontrol("show", "job", "--oneliner", self.id)
        return dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    """Asks Slurm. Where its client is absent (a container without it) the answer is a failure that says so."""
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, "", "scontrol is not on PATH: bind Slurm's client and its files")


def supervise(job: Job, run_dir: Path, command: Sequence[str], stop: StopSignal) -> int:
    """Runs the launcher until the run is finished, the job is to end, or nothing helps. Returns the exit code.

    `{id}`, `{port}` and `{outcome}` in the command become new ones for each try: rendezvous id, port, outcome file.
    """
    run = RunDir(run_dir)
    first = run.newest_step()
    tries, attempt = 0, 0
    while True:
        before = run.newest_step()
        outcome_file = run_dir.parent / f".{run_dir.name}.outcome-{job.id}-{job.life}-{attempt}"
        code = _launch(_filled(command, job, attempt, outcome_file), stop)
        outcome = read_outcome(outcome_file)
        outcome_file.unlink(missing_ok=True)
        after = run.newest_step()
        why = f"exit code {code}" if outcome is None else outcome.kind.replace("_", " ")
        _say(f"job {job.id}, life {job.life}, try {attempt}: {why}; newest checkpoint: {before} -> {after}")

        if outcome is not None and outcome.kind == "finished":
            _num_idle_lives(job, run_dir, is_idle=False)
            return 0
        if outcome is not None and outcome.kind == "user_error":
            return MISTAKE_CODE
        if _is_to_end(job, outcome, stop):
            if stop.name == "SIGUSR1" and _num_idle_lives(job, run_dir, is_idle=after == first) >= MAX_TRIES:
                _say(f"{MAX_TRIES} lives in a row reached the time limit without a new checkpoint: raise --time")
                return NO_PROGRESS_CODE
            return _end(job, stop)
        attempt += 1
        tries = 1 if after != before else tries + 1
        if tries >= MAX_TRIES:
            _say(
                f"{MAX_TRIES} tries in a row ended without a new checkpoint (newest: step {after}); giving up with "
                f"exit code {NO_PROGRESS_CODE}. The errors above name the rank and the cause; lower train.save_every "
                "if it crashes before the first checkpoint"
            )
            return NO_PROGRESS_CODE


def _is_to_end(job: Job, outcome: Outcome | None, stop: StopSignal) -> bool:
    """Whether this life of the job is over; after a crash that is for Slurm to say: nothing starts in a grace time."""
    was_asked = stop.requested or (outcome is not None and outcome.kind == "stopped")
    shown = {} if was_asked else job.shown()
    return was_asked or shown.get("PreemptTime", "None") != "None" or shown.get("JobState", "RUNNING") != "RUNNING"


def _end(job: Job, stop: StopSignal) -> int:
    """Gives the nodes back: requeued, unless Slurm has this job in hand already (scancel, the end of a preemption)."""
    if stop.name in ("SIGTERM", "SIGINT") or job.shown().get("JobState", "RUNNING") != "RUNNING":
        _say("asked to end: Slurm requeues the job itself if it was preempted, and nobody does after scancel")
    elif refused := job.requeue():
        _say(f"cannot requeue ({refused}): submit the job again to go on from the checkpoint")
        return TERMINATED_CODE
    else:
        _say("requeued: the next life goes on from the newest checkpoint")
    # Slurm ends this process: an exit of its own would race with the requeue
    deadline = time.monotonic() + KILL_SECONDS
    while stop.name != "SIGTERM" and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return TERMINATED_CODE


def _num_idle_lives(job: Job, run_dir: Path, is_idle: bool) -> int:
    """Lives of this job in a row that brought no checkpoint, counted in a file beside the run directory."""
    file = run_dir.parent / f".{run_dir.name}.idle-lives-{job.id}"
    if not is_idle:
        file.unlink(missing_ok=True)
        return 0
    try:
        number = 1 + int(file.read_text())
    except (OSError, ValueError):
        number = 1
    write_text(file, str(number))
    return number


def _launch(command: list[str], stop: StopSignal) -> int:
    """Runs the launcher to its end. SIGUSR1 goes on to it; SIGTERM was sent to the steps by Slurm itself."""
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
        "{id}": f"{job.id}-{job.life}-{attempt}",
        "{port}": str(20000 + (number * 7 + job.life * 3 + attempt) % 10000),
        "{outcome}": str(outcome),
    }
    filled = list(command)
    for name, value in values.items():
        filled = [part.replace(name, value) for part in filled]
    return filled


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervise: {text}", file=sys.stderr, flush=True)
