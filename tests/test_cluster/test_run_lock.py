"""A run directory belongs to one job at a time, and to the next one as soon as that job is dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.ranks import ROOT, clean_environment

from qlora_dist.cluster.run_lock import MISSED_BEATS, RunLock
from qlora_dist.errors import UserError

LOCK = "lock"
HOLD = """
import sys, time
from pathlib import Path
from qlora_dist.cluster.run_lock import RunLock
RunLock(Path(sys.argv[1]) / "lock", job="7", beat_seconds=0.5).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=clean_environment(), cwd=ROOT, **pipes)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def _as_of_another_machine(folder):
    """The lock as it looks from another host: process ids say nothing."""
    holder = json.loads((folder / LOCK).read_bytes())
    (folder / LOCK).write_text(json.dumps({**holder, "machine": "elsewhere", "host": "node5"}))


def test_a_run_directory_in_use_is_refused_and_its_holder_is_named(tmp_path, holder):
    with pytest.raises(UserError, match=rf"is in use by job 7, process {holder.pid} on .*, which is alive; wait"):
        RunLock(tmp_path / LOCK, beat_seconds=0.5).acquire()
    assert holder.poll() is None


def test_the_lock_of_a_process_killed_on_this_machine_is_taken_over_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = RunLock(tmp_path / LOCK, beat_seconds=100)  # one beat would be longer than the test
    lock.acquire()
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_the_lock_of_this_jobs_last_life_is_taken_over_at_once_wherever_it_ran(tmp_path, holder):
    holder.kill()
    holder.wait()
    _as_of_another_machine(tmp_path)
    lock = RunLock(tmp_path / LOCK, job="7", restarts=1, beat_seconds=100)
    lock.acquire()
    lock.release()


def test_a_lock_of_another_host_is_taken_over_when_it_stands_still(tmp_path, holder):
    holder.kill()
    holder.wait()
    _as_of_another_machine(tmp_path)
    os.utime(tmp_path / LOCK, (time.time() + 1e6, time.time() + 1e6))  # a clock that goes wrong: times are not read
    started = time.monotonic()
    lock = RunLock(tmp_path / LOCK, job="8", beat_seconds=0.3)
    lock.acquire()
    assert time.monotonic() - started >= MISSED_BEATS * 0.3
    lock.release()


def test_a_holder_that_was_suspended_and_lost_its_lock_ends_itself(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    _as_of_another_machine(tmp_path)
    lock = RunLock(tmp_path / LOCK, job="8", beat_seconds=0.3)
    lock.acquire()
    holder.send_signal(signal.SIGCONT)
    assert holder.wait(30) == 1
    assert f"was taken over by process {os.getpid()}" in holder.stderr.read()
    lock.release()


def test_of_two_that_take_over_together_one_gets_it(tmp_path, holder):
    holder.kill()
    holder.wait()
    locks, outcomes = [RunLock(tmp_path / LOCK, beat_seconds=0.5) for _ in range(2)], []

    def take(lock):
        try:
            lock.acquire()
            outcomes.append("held")
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused"]
    for lock in locks:
        lock.release()
