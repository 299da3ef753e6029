"""What is done to a run, and what becomes of it: nothing saved is lost, every rank ends, the error names the culprit.

Ranks here are processes without a launcher: they must end by themselves. With QLORA_DIST_FAULTS_TABLE=FILE the measured
results are written there, for benchmarks/faults.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.crew import Crew
from helpers.ranks import ROOT, clean_environment, python_path, torchrun
from helpers.slurm_cluster import wait_for
from helpers.tiny_run import changed, digests_of, losses_of, make_inputs, metrics_of, write_config

TESTS = ROOT / "tests"
STEPS, SAVE_EVERY = 6, 2
LAST = "checkpoints/step-00000006"
SLOW = {"do": "sleep", "seconds": 0.4, "at": "step"}
IN_STEP_4 = {"at": "step", "rank": 1, "step": 3}
SEEN = {"do": "be seen", **IN_STEP_4}  # the last fault of a list comes first


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), num_examples=40)


@pytest.fixture(scope="module")
def sound(inputs, tmp_path_factory):
    """Run directory of a run of two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("sound")
    with Crew(_config(inputs, folder), folder) as crew:
        assert [end.code for end in crew.wait()] == [0, 0], crew.output()
    return folder / "run"


@pytest.fixture
def config(inputs, tmp_path):
    return _config(inputs, tmp_path)


@pytest.fixture(scope="module")
def table():
    """Takes (fault, outcome, steps lost, seconds until all ranks had exited)."""
    rows: list[dict[str, str]] = []
    yield lambda fault, what, lost, seconds: rows.append(
        {
            "fault": fault,
            "outcome": what,
            "steps_lost": str(lost),
            "seconds": "-" if seconds is None else f"{seconds:.1f}",
        }
    )
    if path := os.environ.get("QLORA_DIST_FAULTS_TABLE"):
        Path(path).write_text(json.dumps(rows))


def _config(inputs, folder, **changes):
    run = {"run_dir": str(folder / "run"), "train__steps": STEPS, "train__save_every": SAVE_EVERY}
    return write_config(folder / "config.yaml", changed(inputs, **{**run, **changes}))


def _finish(config, folder, sound):
    """The same command again, without the fault: it finishes as if nothing had been. Returns the step it began at."""
    with Crew(config, folder) as crew:
        ends = crew.wait()
    assert [end.code for end in ends] == [0, 0], ends
    assert losses_of(folder / "run") == losses_of(sound)
    assert digests_of(folder / "run" / LAST) == digests_of(sound / LAST)
    found = re.search(r"resuming from .* \(step (\d+)\)", ends[0].output)
    return int(found[1]) if found else 0


def _done(folder):
    return len(losses_of(folder / "run")) if (folder / "run" / "metrics.jsonl").exists() else 0


def test_a_rank_killed_in_a_step_is_named_by_the_others_and_the_run_goes_on(config, tmp_path, sound, table):
    with Crew(config, tmp_path, {"do": "SIGKILL", **IN_STEP_4}, SEEN) as crew:
        killed, other = reversed(crew.wait())
    assert (killed.code, other.code) == (-signal.SIGKILL, 1)
    assert re.search(
        r"lost; rank 1 \(.*, process \d+\) was last seen in step 4, about \d+ s ago: it has exited", other.output
    )
    assert "rank 0 (" not in other.output
    lost = _done(tmp_path) - _finish(config, tmp_path, sound)
    assert lost == 1
    table("`kill -9` of one rank in a step", "the others exit, naming it", lost, other.at - killed.at)


def test_all_ranks_killed_in_a_step(config, tmp_path, sound, table):
    with Crew(config, tmp_path, {"do": "SIGKILL", "at": "step", "step": 5}) as crew:
        assert [end.code for end in crew.wait()] == [-signal.SIGKILL] * 2
    lost = _done(tmp_path) - _finish(config, tmp_path, sound)
    assert lost == 1
    table("`kill -9` of all ranks in a step", "the next start resumes from the newest checkpoint", lost, None)


def test_rank_0_killed_in_a_save(config, tmp_path, sound, table):
    # the fourth text: the manifest of the second checkpoint, of which all else is written
    with Crew(config, tmp_path, {"do": "SIGKILL", "at": "save", "nth": 2}) as crew:
        killed, other = crew.wait()
    assert (killed.code, other.code) == (-signal.SIGKILL, 1)
    assert re.search(r"rank 1: error: .*lost; rank 0 \(.*\) has exited: its store does not answer", other.output)
    lost = _done(tmp_path) - _finish(config, tmp_path, sound)
    assert lost == SAVE_EVERY
    table(
        "`kill -9` of rank 0 while it saves",
        "the partial checkpoint is removed, the previous one is used",
        lost,
        other.at - killed.at,
    )


def test_the_rank_that_tokenizes_is_killed(inputs, tmp_path, sound, table):
    config = _config(inputs, tmp_path, data__cache_dir=str(tmp_path / "cache"))
    with Crew(config, tmp_path, {"do": "SIGKILL", "at": "data", "rank": 0}) as crew:
        killed, other = crew.wait()
    assert (killed.code, other.code) == (-signal.SIGKILL, 1)
    assert "rank 0" in other.output and "has exited" in other.output
    assert _finish(config, tmp_path, sound) == 0
    table(
        "`kill -9` of the rank that tokenizes",
        "the others exit, naming it; nothing half-built is used",
        0,
        other.at - killed.at,
    )


def test_sigterm_twice_to_one_rank_stops_all_after_the_step_with_a_checkpoint(config, tmp_path, sound, table):
    fault = {"do": "SIGTERM", "times": 2, "at": "step", "rank": 1, "step": 2}
    with Crew(config, tmp_path, fault, SLOW) as crew:
        first, second = crew.wait()
    assert (first.code, second.code) == (0, 0), crew.output()
    step = int(re.search(r"stopped by SIGTERM after step (\d+); checkpoint saved", first.output)[1])
    assert step in (3, 4) and _done(tmp_path) == step  # the step at hand, or the next one
    lost = step - _finish(config, tmp_path, sound)
    assert lost == 0
    table(
        "SIGTERM twice, to one of two ranks",
        "all finish the step, save, and exit with 0",
        lost,
        abs(first.at - second.at),
    )


@pytest.mark.parametrize("place", ["data", "load"])
def test_a_signal_to_one_rank_while_the_run_starts_ends_all_ranks_at_once(inputs, tmp_path, sound, table, place):
    config = _config(inputs, tmp_path, data__cache_dir=str(tmp_path / "cache"))
    # rank 0 is busy for longer than all are waited for, and only rank 1 is asked to stop
    busy = {"do": "sleep", "seconds": 600, "at": place, "rank": 0}
    with Crew(config, tmp_path, busy) as crew:
        wait_for(lambda: f"fault: sleep at {place}" in crew.output(), 60, "rank 0 to be busy", crew.output)
        asked = time.monotonic()
        crew.send(1, signal.SIGUSR1)
        ends = crew.wait()
    assert [end.code for end in ends] == [0, 0], crew.output()
    assert "stopped by SIGUSR1 before the first step; nothing is lost" in ends[0].output
    seconds = max(end.at for end in ends) - asked
    assert _finish(config, tmp_path, sound) == 0
    what = {"data": "tokenizing", "load": "loading the model"}[place]
    table(f"SIGUSR1 to one rank while another is {what}", "all exit with 0", 0, seconds)


def test_an_evaluation_is_cut_short_by_a_signal_and_made_up_for(inputs, tmp_path, table):
    held_out = {
        "data__eval": [{**inputs["data"]["train"][0], "path": str(Path(inputs["run_dir"]).parent / "held_out.json")}]
    }
    settings = {**held_out, "train__eval_every": 3, "train__eval_at_start": False}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    with Crew(_config(inputs, whole, **settings), whole) as crew:
        crew.wait()
    config = _config(inputs, broken, **settings)
    with Crew(config, broken, {"do": "SIGUSR1", "at": "evaluate", "rank": 1, "nth": 1}) as crew:
        ends = crew.wait()
    assert [end.code for end in ends] == [0, 0] and "stopped by SIGUSR1 after step 3" in ends[0].output
    assert "eval_loss" not in metrics_of(broken / "run")[-1], "a part of the held-out data was reported"
    with Crew(config, broken) as crew:
        assert [end.code for end in crew.wait()] == [0, 0]
    found, expected = ([m.get("eval_loss") for m in metrics_of(f / "run")] for f in (broken, whole))
    assert found == expected and len([x for x in found if x is not None]) == 2
    table(
        "SIGUSR1 in an evaluation",
        "interrupted, saved; repeated after the restart",
        0,
        max(e.at for e in ends) - min(e.at for e in ends),
    )


def test_a_disk_that_is_full_at_a_save_ends_all_ranks_and_nothing_saved_is_lost(config, tmp_path, sound, table):
    with Crew(config, tmp_path, {"do": "disk full", "at": "save", "nth": 2}) as crew:
        ends = crew.wait()
    assert [end.code for end in ends] == [1, 1], crew.output()
    # rank 0 cannot even write that: its output is a file too
    text = r"step-00000004 could not be written: .*; the last good checkpoint is .*step-00000002"
    assert re.search(text, ends[1].output), ends[1].output
    lost = 4 - _finish(config, tmp_path, sound)
    assert lost == SAVE_EVERY
    table(
        "full disk at a save", "all ranks exit; the previous checkpoint is intact", lost, abs(ends[0].at - ends[1].at)
    )


def test_a_run_directory_that_cannot_be_written_is_a_users_mistake(inputs, tmp_path, table):
    config = _config(inputs, tmp_path, run_dir="/sys/kernel/qlora_run")  # read-only for root too
    started = time.monotonic()
    with Crew(config, tmp_path, ranks=1) as crew:
        [end] = crew.wait()
    assert end.code == 2 and "run_dir /sys/kernel/qlora_run: cannot be written (" in end.output
    table("read-only run directory", "exit code 2 before data or model are read", 0, end.at - started)


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(config, tmp_path, sound, table, damage):
    with Crew(config, tmp_path, {"do": "SIGKILL", "at": "step", "step": 5}) as crew:
        crew.wait()
    file = tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content[: -100 if damage == "truncated" else None])
    lost = 5 - _finish(config, tmp_path, sound)
    assert lost == 1 + SAVE_EVERY
    table(
        f"newest checkpoint damaged ({damage})", "found by its checksum and named; the previous one is used", lost, None
    )


@pytest.mark.parametrize(("ranks", "number"), [(2, signal.SIGKILL), (1, signal.SIGUSR1)])
@pytest.mark.launched
def test_when_the_launcher_dies_its_ranks_save_and_end(config, tmp_path, sound, table, ranks, number):
    slow = json.dumps([{**SLOW, "seconds": 1.5}])  # two steps or three until they notice
    path = os.pathsep.join([str(TESTS / "faults"), python_path()])
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*torchrun(ranks), "-m", "qlora_dist", "train", str(config)],
            env={**clean_environment(), "FAULTS": slow, "PYTHONPATH": path},
            stdout=log,
            stderr=log,
            cwd=ROOT,
        )
    output = (tmp_path / "log").read_text
    wait_for(lambda: _done(tmp_path) >= 1, 120, "the first step", output)
    launcher.send_signal(number)
    launcher.wait()
    ended = time.monotonic()
    wait_for(lambda: "stopped by" in output(), 30, "the orphans to stop", output)
    wait_for(lambda: not (tmp_path / "run" / "lock").exists(), 30, "the lock to be released", output)
    seconds = time.monotonic() - ended
    step = int(re.search(r"stopped by the end of its launcher after step (\d+); checkpoint saved", output())[1])
    assert step < STEPS and _done(tmp_path) == step
    if ranks == 1:  # `sound` had two: other roundings
        assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
        return
    assert _finish(config, tmp_path, sound) == step
    table("`kill -9` of torchrun, steps of 1.5 s", "its ranks notice, save and exit", 0, seconds)


@pytest.mark.parametrize("how", ["sleep", "SIGSTOP"])
def test_a_rank_that_hangs_is_named_after_the_timeout_and_prints_where_it_hangs(inputs, tmp_path, sound, table, how):
    config = _config(inputs, tmp_path, strategy__timeout_seconds=4)
    began = tmp_path / "began"
    fault = {"do": how, "seconds": 600, **IN_STEP_4, "once": str(began)}
    with Crew(config, tmp_path, fault, SEEN) as crew:
        wait_for(began.exists, 100, "the fault", crew.output)
        hung_at = time.monotonic()
        waiting = crew.wait_for_rank(0)
        if how == "sleep":
            hung = crew.wait_for_rank(1)
    seconds = waiting.at - hung_at
    assert waiting.code == 1
    if how == "sleep":  # either of the two may be the one that speaks
        assert hung.code == 1
        both = waiting.output + hung.output
        assert re.search(
            r"rank 1 \(.*\) (is not waiting: busy with step 4 for \d+ s|was in step 4 for more than 4 s)", both
        )
        assert re.search(r"stacks of rank 1 .*sitecustomize.py\", line \d+ in strike", hung.output, re.DOTALL)
    else:
        assert re.search(
            r"error: rank 0 \(.*\) was in step 4 for more than 4 s, waiting for other ranks; rank 1 \(.*, process "
            r"\d+\) was last seen in step 4, about \d+ s ago: it has exited, is stopped, or its host is lost",
            waiting.output,
        )
    lost = _done(tmp_path) - _finish(config, tmp_path, sound)
    assert lost == 1
    what = {"sleep": "hangs in a step", "SIGSTOP": "is stopped (SIGSTOP)"}[how]
    table(
        f"a rank {what}, timeout 4 s",
        "all exit; it is named" + ("" if how == "SIGSTOP" else ", its stacks are printed"),
        lost,
        seconds,
    )


def test_a_rank_whose_store_no_longer_answers_ends_within_its_limit(inputs, tmp_path, sound, table):
    """Rank 0 holds the store: while it is stopped, calls to it do not return, as when its host is cut off."""
    config = _config(inputs, tmp_path, strategy__timeout_seconds=2)
    began = tmp_path / "began"
    fault = {"do": "SIGSTOP", **IN_STEP_4, "rank": 0, "once": str(began)}
    with Crew(config, tmp_path, fault, {**SEEN, "rank": 0}) as crew:
        wait_for(began.exists, 100, "the fault", crew.output)
        stopped_at = time.monotonic()
        other = crew.wait_for_rank(1)
    assert other.code == 1
    assert re.search(
        r"error: rank 1 \(.*\) was in step 4 for more than 2 s, waiting for other ranks; the store of rank 0 \(.*\) "
        r"does not answer: its host, or the network to it, is lost",
        other.output,
    )
    lost = _done(tmp_path) - _finish(config, tmp_path, sound)
    table(
        "rank 0, with the store, is stopped (SIGSTOP), timeout 2 s",
        "the others exit, naming it",
        lost,
        other.at - stopped_at,
    )


def test_a_node_that_comes_up_late_is_waited_for(config, tmp_path, sound, table):
    with Crew(config, tmp_path, late_seconds=5) as crew:
        assert [end.code for end in crew.wait()] == [0, 0]
    assert losses_of(tmp_path / "run") == losses_of(sound)
    table("a node that starts 5 s late", "the others wait", 0, None)


def test_wrong_clocks_change_nothing(config, tmp_path, sound, table):
    with Crew(
        config, tmp_path, {"do": "wrong clock", "at": "data", "rank": 0}, {"do": "SIGKILL", "at": "step", "step": 5}
    ) as crew:
        crew.wait()
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    for path in [newest, *newest.iterdir()]:
        os.utime(path, (0, 0))
    assert _finish(config, tmp_path, sound) == 4
    table("clocks 115 days apart, and jumping", "nothing: checkpoints are ordered by step", 0, None)


def test_a_second_job_in_the_same_run_directory_is_refused(config, tmp_path, sound, table):
    go_on = tmp_path / "go on"
    with Crew(config, tmp_path, {"do": "wait", "file": str(go_on), "at": "step", "step": 1}, job="17") as first:
        wait_for(lambda: _done(tmp_path) >= 1, 60, "the first step", first.output)
        started = time.monotonic()
        with Crew(config, tmp_path, job="18") as second:
            ends = second.wait()
        go_on.touch()
        assert [end.code for end in ends] == [2, 2]
        assert f"run_dir {tmp_path}/run is in use by job 17, process {first.processes[0].pid} on " in ends[0].output
        assert [end.code for end in first.wait()] == [0, 0]
    assert losses_of(tmp_path / "run") == losses_of(sound)
    table(
        "a second job in the same run directory",
        "exit code 2, naming the first, which continues",
        0,
        max(e.at for e in ends) - started,
    )
