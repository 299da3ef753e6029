"""The batch process of a job starts the launcher again as long as that helps. With a Slurm: tests/cluster/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ranks import ROOT, clean_environment

from qlora_dist.cluster.stop_signal import StopSignal
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
    assert lines == ["DIR", "DIR", *["DIR --resume auto"] * 2]
    said.unlink()
    assert supervise(Job("17", 1), run, command, StopSignal(), resume="DIR") == 93  # requeued
    assert all(line.endswith("--resume auto") for line in said.read_text().splitlines())


def test_starts_that_all_reach_the_time_limit_without_a_checkpoint_are_counted(tmp_path):
    found = [_num_stalled_starts(Job("17", life), tmp_path / "run", is_stalled=life != 1) for life in range(4)]
    assert found == [1, 0, 1, 2]  # three in a row end the job
    assert _num_stalled_starts(Job("18", 0), tmp_path / "run", is_stalled=True) == 1
