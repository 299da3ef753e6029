"""The batch process of a job starts the launcher again as long as that helps. With a Slurm: tests/cluster/."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ranks import ROOT, clean_environment

from qlora_dist.cluster.stop_signal import StopSignal
from qlora_dist.commands import supervise as supervision
from qlora_dist.commands.supervise import Job, _num_stalled_starts, supervise
from qlora_dist.commands.supervise.exit_report import Outcome, read_outcome, report_outcome
from qlora_dist.errors import MachineFailed, RunFailed, UserError
from qlora_dist.train.run import TrainState

# a launcher: writes down how it was started, saves a checkpoint where told to, and ends as told
LAUNCHER = """
import json, sys
from pathlib import Path
run, plan, identity, port, outcome = Path(sys.argv[1]), json.loads(sys.argv[2]), *sys.argv[3:]
log = run.parent / "starts"
starts = log.read_text().splitlines() if log.exists() else []
log.write_text("\\n".join([*starts, f"{identity} {port}"]))
act = plan[min(len(starts), len(plan) - 1)]
if "save" in act:
    (run / "checkpoints" / f"step-{act['save']:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"step-{act['save']:08d}" / "manifest.json").touch()
if "kind" in act:
    Path(outcome).write_text(json.dumps({"kind": act["kind"]}))
sys.exit(act.get("code", 1))
"""


def _supervise(tmp_path: Path, *plan: dict[str, object]) -> tuple[int, list[str], str]:
    """(exit code, "id port" of each start, what was said). Slurm's client is not on PATH, as in many a container."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{name: m}}\ndata: {{train: [{{path: d.json}}]}}\ntrain: {{steps: 5}}\n"
    )
    command = [sys.executable, "-m", "qlora_dist", "supervise", "--job", "17", "--restarts", "2", str(config), "--"]
    launcher = [sys.executable, "-c", LAUNCHER, str(tmp_path / "run"), json.dumps(plan), "{id}", "{port}", "{outcome}"]
    done = subprocess.run(
        [*command, *launcher],
        env=clean_environment() | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert not list(tmp_path.glob(".run.outcome*")), "an outcome file was left"
    return done.returncode, (tmp_path / "starts").read_text().splitlines(), done.stderr


def test_three_tries_without_a_new_checkpoint_end_with_93(tmp_path):
    code, starts, said = _supervise(tmp_path, {})
    assert (code, len(starts)) == (93, 3)
    assert "3 attempts in a row ended without a new checkpoint (newest: step -1); giving up with exit code 93" in said


def test_progress_earns_new_tries_each_with_its_own_rendezvous(tmp_path):
    code, starts, said = _supervise(tmp_path, {}, {}, {"save": 4}, {}, {"save": 8}, {"kind": "finished", "code": 0})
    assert (code, len(starts)) == (0, 6), said
    identities, ports = zip(*(start.split() for start in starts))
    assert identities[0] == "17-2-0" and len(set(identities)) == len(set(ports)) == 6
    assert "newest checkpoint: 4 -> 8" in said


def test_three_tries_after_progress_are_three(tmp_path):
    code, starts, said = _supervise(tmp_path, {}, {}, {"save": 4}, {}, {}, {})
    assert (code, len(starts)) == (93, 6), said
    assert "3 attempts in a row ended without a new checkpoint (newest: step 4)" in said


def test_a_users_mistake_is_not_tried_again(tmp_path):
    code, starts, _ = _supervise(tmp_path, {"kind": "user_error", "code": 1})
    assert (code, len(starts)) == (2, 1)


def test_a_wrong_config_ends_before_a_launcher_is_started(tmp_path):
    command = [
        sys.executable,
        "-m",
        "qlora_dist",
        "supervise",
        "--job",
        "1",
        str(tmp_path / "absent.yaml"),
        "--",
        "false",
    ]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and "absent.yaml: cannot be read" in done.stderr


def test_the_outcome_says_how_a_start_ended(tmp_path):
    file = tmp_path / "outcome"

    def fail(error):
        raise error

    report_outcome(file, True, lambda: TrainState(7))
    assert read_outcome(file) == Outcome("finished", 7)
    report_outcome(file, True, lambda: TrainState(7, stopped_by="SIGTERM"))
    assert read_outcome(file) == Outcome("stopped", 7, "SIGTERM")
    file.unlink()
    report_outcome(file, False, lambda: TrainState(7))  # rank 0 speaks
    assert read_outcome(file) is None
    # of a failure any rank, and what says most stays
    for error, expected in [
        (RunFailed("lost"), Outcome("failed", text="lost")),
        (MachineFailed("disk"), Outcome("machine_failed", text="disk")),
        (ValueError("a crash"), Outcome("machine_failed", text="disk")),
        (UserError("no such file"), Outcome("user_error", text="no such file")),
        (RunFailed("lost"), Outcome("user_error", text="no such file")),
    ]:
        with pytest.raises(type(error)):
            report_outcome(file, False, lambda error=error: fail(error))
        assert read_outcome(file) == expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(28, "No space left"), "machine_failed"), (OSError(5, "I/O"), "machine_failed"), (MemoryError(),
     "machine_failed"), (PermissionError(13, "denied"), "user_error"), (KeyError("x"), "failed"),
     (KeyboardInterrupt(), "failed")],
    ids=repr,
)  # fmt: skip
def test_every_end_has_an_outcome(tmp_path, error, kind):
    def fail():
        raise error

    with pytest.raises(type(error)):
        report_outcome(tmp_path / "outcome", True, fail)
    outcome = read_outcome(tmp_path / "outcome")
    assert outcome.kind == kind and outcome.text


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "null", "{}", '{"kind": []}', '{"kind": "odd"}', '{"kind": {"a": 1}}', "[" * 100_000,
             '{"kind": "failed", "text": 5}', '{"kind": "stopped", "signal": []}', '{"kind": "failed", "more": 1}'],
    ids=range(12),
)  # fmt: skip
def test_an_outcome_of_any_other_form_is_none(tmp_path, text):
    (tmp_path / "outcome").write_text(text)
    assert read_outcome(tmp_path / "outcome") is None


@pytest.mark.parametrize("kind", ["machine_failed", "failed"])
def test_failures_of_machine_and_run_are_tried_again(tmp_path, kind):
    code, starts, said = _supervise(tmp_path, {"kind": kind}, {"kind": "finished", "code": 0})
    assert (code, len(starts)) == (0, 2)
    assert f"attempt 0: {kind.replace('_', ' ')}" in said


# --- what Slurm says of the job ---------------------------------------------------------------------------------------


class FakeJob:
    """A job of which Slurm says what is given."""

    def __init__(self, shown: dict[str, str]) -> None:
        self.id, self.restarts, self.asked = "17", 0, []
        self.shown = lambda: shown
        self.requeue = lambda: self.asked.append("requeue")


def _in_process(tmp_path, job, *plan, signal_name=None):
    """(exit code, number of starts): the launcher acts as in `_supervise`; a signal arrives when its start ends."""
    stop, launch = StopSignal(), supervision._launch

    def launched(command, stop):
        code = launch(command, stop)
        stop.name = signal_name
        return code

    launcher = [sys.executable, "-S", "-c", LAUNCHER, str(tmp_path / "run"), json.dumps(plan)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervision, "_launch", launched)
        code = supervise(job, tmp_path / "run", [*launcher, "{id}", "{port}", "{outcome}"], stop)
    return code, len((tmp_path / "starts").read_text().splitlines())


@pytest.fixture
def no_wait(monkeypatch):
    """Nobody kills this process after a requeue."""
    monkeypatch.setattr(supervision, "KILL_SECONDS", 0.0)


RUNNING = {"JobState": "RUNNING", "PreemptTime": "None"}


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize(
    ("shown", "code", "starts", "requeued"),
    [
        (RUNNING, 93, 3, 0),
        ({}, 93, 3, 0),  # no answer
        ({**RUNNING, "PreemptTime": "2030-01-01T00:00:00"}, 143, 1, 1),
        ({**RUNNING, "JobState": "COMPLETING"}, 143, 1, 0),
    ],
)
def test_after_a_crash_nothing_is_started_in_a_grace_time(tmp_path, shown, code, starts, requeued):
    job = FakeJob(shown)
    assert _in_process(tmp_path, job, {}) == (code, starts)
    assert len(job.asked) == requeued


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize(
    ("name", "state", "requeued"),
    [
        ("SIGUSR1", "RUNNING", 1),
        ("SIGUSR1", "CANCELLED", 0),
        *((f"SIG{n}", "RUNNING", 0) for n in ("TERM", "INT", "HUP")),
    ],
)
def test_only_a_job_near_its_time_limit_that_still_runs_is_requeued(tmp_path, name, state, requeued):
    job = FakeJob({**RUNNING, "JobState": state})
    assert _in_process(tmp_path, job, {"kind": "stopped", "code": 0}, signal_name=name) == (143, 1)
    assert len(job.asked) == requeued


@pytest.mark.usefixtures("no_wait")
def test_steps_that_were_told_to_stop_are_not_started_again(tmp_path):
    """A preemption, of which the batch process hears nothing."""
    job = FakeJob(RUNNING)
    assert _in_process(tmp_path, job, {"kind": "stopped", "code": 0}) == (143, 1)
    assert job.asked == ["requeue"]


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize(
    ("act", "code", "counted"),
    [({}, 93, "3"), ({"save": 4}, 143, None), ({"kind": "finished", "code": 0}, 0, None)],
    ids=["nothing saved", "saved", "finished"],
)
def test_the_third_start_that_saves_nothing_before_its_time_limit_is_the_last(tmp_path, act, code, counted):
    idle = tmp_path / ".run.idle-lives-17"
    idle.write_text("2")
    assert (
        _in_process(tmp_path, FakeJob(RUNNING), {"kind": "stopped", "code": 0, **act}, signal_name="SIGUSR1")[0] == code
    )
    assert (idle.read_text() if idle.exists() else None) == counted


def test_the_warning_reaches_the_launcher_also_when_it_has_missed_the_first(monkeypatch):
    monkeypatch.setattr(supervision, "FORWARD_SECONDS", 0.2)
    monkeypatch.setattr(supervision, "POLL_SECONDS", 0.02)
    launcher = """
import signal, sys, time
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
print("ready", flush=True)
deadline = time.monotonic() + 10
while len(heard) < 2 and time.monotonic() < deadline:
    time.sleep(0.01)
sys.exit(7 if len(heard) >= 2 else 1)
"""
    stop, started = StopSignal(), subprocess.Popen

    def started_and_ready(command):
        process = started(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        stop.name = "SIGUSR1"
        return process

    monkeypatch.setattr(supervision.subprocess, "Popen", started_and_ready)
    assert supervision._launch([sys.executable, "-S", "-c", launcher], stop) == 7


@pytest.mark.parametrize("kind", ["absent", "not executable", "fails"])
def test_a_client_of_slurm_that_gives_no_answer_is_a_reason_and_no_traceback(tmp_path, monkeypatch, kind):
    if kind != "absent":
        (tmp_path / "scontrol").write_text("#!/bin/sh\necho no such job >&2\nexit 3\n")
        (tmp_path / "scontrol").chmod(0o755 if kind == "fails" else 0o644)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Job("17", 0).shown() == {}
    reason = {"absent": "not on PATH", "not executable": "cannot be started: .*denied", "fails": "no such job"}[kind]
    assert re.search(reason, Job("17", 0).requeue())


def test_a_named_checkpoint_is_that_of_the_first_start_alone(tmp_path):
    """Another attempt would begin there once more, and put aside all that was done since."""
    run = tmp_path / "run"
    # writes down its arguments; the second start saves
    launcher = """
import sys
from pathlib import Path
said, run = Path(sys.argv[1]), Path(sys.argv[3])
said.write_text((said.read_text() if said.exists() else "") + " ".join(sys.argv[2:]) + "\\n")
if said.read_text().count("\\n") == 2:
    (run / "checkpoints" / "step-00000004").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "step-00000004" / "manifest.json").touch()
sys.exit(1)
"""
    said = tmp_path / "said"
    command = [sys.executable, "-c", launcher, str(said), "train", str(run), "--resume", "DIR"]
    assert supervise(Job("17", 0), run, command, StopSignal(), resume="DIR") == 93
    lines = [line.partition("--resume ")[2] for line in said.read_text().splitlines()]
    assert lines == ["DIR", "DIR", *["DIR --resume auto"] * 3]
    said.unlink()
    assert supervise(Job("17", 1), run, command, StopSignal(), resume="DIR") == 93  # requeued
    assert all(line.endswith("--resume auto") for line in said.read_text().splitlines())


def test_starts_that_all_reach_the_time_limit_without_a_checkpoint_are_counted(tmp_path):
    found = [_num_stalled_starts(Job("17", life), tmp_path / "run", is_stalled=life != 1) for life in range(4)]
    assert found == [1, 0, 1, 2]  # three in a row end the job
    assert _num_stalled_starts(Job("18", 0), tmp_path / "run", is_stalled=True) == 1
