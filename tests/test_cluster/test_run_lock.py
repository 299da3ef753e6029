"""A run directory belongs to one job at a time, and to the next one as soon as that job is dead."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.ranks import ROOT, clean_environment

from qlora_dist.cluster.run_lock import MISSED_BEATS, RunLock, _machine
from qlora_dist.errors import MachineFailed, UserError

LOCK = "lock"
HOLD = """
import signal, sys
from pathlib import Path
from qlora_dist.cluster.run_lock import RunLock
RunLock(Path(sys.argv[1]) / "lock", job="7", beat_seconds=0.5).acquire()
print("held", flush=True)
signal.pause()
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


@pytest.fixture
def at_once(monkeypatch):
    """No heartbeat is waited for: with beats of 100 s only the second look after a take-over sleeps for a second."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds) if seconds <= 1 else pytest.fail("it waits"))


def _as_of_another_machine(folder):
    """The lock as it looks from another host: process ids say nothing."""
    holder = json.loads((folder / LOCK).read_bytes())
    (folder / LOCK).write_text(json.dumps({**holder, "machine": "elsewhere", "host": "node5"}))


def test_a_run_directory_in_use_is_refused_and_its_holder_is_named(tmp_path, holder):
    with pytest.raises(UserError, match=rf"is in use by job 7, process {holder.pid} on .*, which is alive; wait"):
        RunLock(tmp_path / LOCK, beat_seconds=0.5).acquire()
    assert holder.poll() is None


@pytest.mark.usefixtures("at_once")
def test_the_lock_of_a_process_killed_on_this_machine_is_taken_over_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = RunLock(tmp_path / LOCK, beat_seconds=100)
    lock.acquire()
    lock.release()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.usefixtures("at_once")
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
    lock = RunLock(tmp_path / LOCK, job="8", beat_seconds=0.05)
    lock.acquire()
    assert time.monotonic() - started >= MISSED_BEATS * 0.05
    lock.release()


def test_a_holder_that_was_suspended_and_lost_its_lock_ends_itself(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    _as_of_another_machine(tmp_path)
    lock = RunLock(tmp_path / LOCK, job="8", beat_seconds=0.05)
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


def test_of_two_that_find_a_lock_stale_at_the_same_time_the_last_to_write_gets_it(tmp_path):
    (tmp_path / LOCK).write_bytes(_valid())
    both = threading.Barrier(2, timeout=30)
    locks, outcomes = [RunLock(tmp_path / LOCK, beat_seconds=5.0) for _ in range(2)], {}

    def take(number):
        lock, write = locks[number], locks[number]._write
        lock._require_stale = both.wait  # stale, says either

        def late():
            time.sleep(0.05 * number)
            write()

        lock._write = late
        try:
            lock.acquire()
            outcomes[number] = "held"
        except UserError:
            outcomes[number] = "refused"

    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {0: "refused", 1: "held"}
    for lock in locks:
        lock.release()


@pytest.mark.usefixtures("at_once")
def test_another_process_with_the_holders_number_is_not_the_holder(tmp_path):
    (tmp_path / LOCK).write_bytes(_valid(machine=_machine(), pid=os.getpid(), started="1"))
    lock = RunLock(tmp_path / LOCK, beat_seconds=100)
    lock.acquire()
    lock.release()


def test_two_processes_of_one_start_of_a_job_do_not_share_a_directory(tmp_path, holder):
    with pytest.raises(UserError, match=rf"is in use by job 7, process {holder.pid}"):
        RunLock(tmp_path / LOCK, job="7", restarts=0, beat_seconds=0.5).acquire()


def test_a_lock_that_another_has_taken_over_is_left_to_it(tmp_path):
    lock = RunLock(tmp_path / LOCK, beat_seconds=100)
    lock.acquire()
    (tmp_path / LOCK).write_bytes(_valid())
    lock.release()
    assert (tmp_path / LOCK).read_bytes() == _valid()


def test_what_other_hosts_read_is_on_the_disk(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda one: (synced.append(os.readlink(f"/proc/self/fd/{one}")), sync(one)))
    lock = RunLock(tmp_path / LOCK, beat_seconds=100)
    lock.acquire()
    assert synced == [str(tmp_path / LOCK)]
    lock.release()


PLACED = {
    "a pipe": lambda lock, other: os.mkfifo(lock),
    "a folder": lambda lock, other: lock.mkdir(),
    "a symbolic link": lambda lock, other: lock.symlink_to(other),
}


@pytest.mark.parametrize("what", PLACED)
def test_what_is_no_file_is_refused_at_once_and_a_link_is_not_written_through(tmp_path, what):
    other = tmp_path / "other"
    other.write_text("precious")
    PLACED[what](tmp_path / LOCK, other)
    with pytest.raises(UserError, match=rf"lock is {what}, expected the lock file of this run; remove it"):
        RunLock(tmp_path / LOCK, beat_seconds=100).acquire()
    assert other.read_text() == "precious"


def test_a_link_to_nothing_creates_nothing(tmp_path):
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        RunLock(tmp_path / LOCK, beat_seconds=100).acquire()
    assert not (tmp_path / "elsewhere").exists()


def _valid(**changes):
    holder = {"token": "t", "job": None, "life": 0, "host": "h", "machine": "m", "pid": 1, "started": None, "beat": 1}
    return json.dumps({**holder, **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[" * 1000,
        b"[" * 10**6,
        b"7",
        b"[]",
        b"{}",
        _valid(pid="../../etc"),
        _valid(pid=10**40),
        _valid(pid=True),
        _valid(token=[1]),
        _valid(host={"a": 1}),
        _valid(job=7),
        _valid(machine=None),
        _valid(life=[[]]),
    ],
    ids=lambda content: repr(content[:30]),
)
def test_odd_content_that_stands_still_is_taken_over(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    lock = RunLock(tmp_path / LOCK, job="8", beat_seconds=0.01)
    lock.acquire()
    lock.release()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_lock_that_cannot_be_written_is_one_paragraph(tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(MachineFailed, match=rf"writing the lock {tmp_path}/lock: {os.strerror(number)}"):
        RunLock(tmp_path / LOCK).acquire()


def test_a_lock_in_a_folder_that_is_gone_is_one_paragraph(tmp_path):
    with pytest.raises(MachineFailed, match=r"taking the lock .*: No such file"):
        RunLock(tmp_path / "gone" / LOCK).acquire()
