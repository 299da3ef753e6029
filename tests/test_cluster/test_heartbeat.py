"""A rank that can no longer advance ends by itself and says why, also when the store never answers again."""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from types import SimpleNamespace

import pytest

from qlora_dist.cluster import heartbeat
from qlora_dist.cluster.bounded import NoAnswer, within
from qlora_dist.cluster.heartbeat import Heartbeat
from qlora_dist.cluster.stop_signal import LAUNCHER_ENDED
from qlora_dist.errors import MachineFailed, UserError


class MemoryStore:
    """A store of this process; `lose` cuts it off: calls then never return."""

    def __init__(self):
        self.values, self.lost, self.lock = {}, threading.Event(), threading.Lock()

    def lose(self):
        self.lost.set()

    def _answer(self):
        if self.lost.is_set():
            threading.Event().wait()

    def set(self, key, value):
        self._answer()
        self.values[key] = value.encode()

    def get(self, key):
        self._answer()
        return self.values[key]

    def check(self, keys):
        self._answer()
        return all(key in self.values for key in keys)

    def add(self, key, amount):
        self._answer()
        with self.lock:
            self.values[key] = self.values.get(key, 0) + amount
            return self.values[key]


class Exits:
    """In place of os._exit: the code; the thread that asked for it does not go on."""

    def __init__(self):
        self.codes, self.event = [], threading.Event()
        self.parent, self.num_looks = os.getppid(), 0

    def getppid(self):
        self.num_looks += 1
        return self.parent

    def __call__(self, code):
        self.codes.append(code)
        self.event.set()
        threading.Event().wait()


@pytest.fixture
def exits(monkeypatch):
    exits = Exits()
    monkeypatch.setattr(heartbeat, "os", SimpleNamespace(_exit=exits, getpid=os.getpid, getppid=exits.getppid))
    for name, seconds in (("BEAT", 0.02), ("LOOK", 0.06), ("STORE", 0.1), ("REPORT", 0.3), ("SILENT", 0.4)):
        monkeypatch.setattr(heartbeat, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(heartbeat, "READ_SECONDS", 5.0)
    return exits


@pytest.fixture
def start(exits):
    started = []

    def start(store, rank=1, size=2, wait_seconds=60.0, launcher=None, stop=None):
        stop = stop or SimpleNamespace(name=None, is_listening=False)
        started.append(Heartbeat(store, rank, size, f"host{rank}", stop, wait_seconds, launcher))
        return started[-1]

    yield start
    for one in started:
        one._ended.set()


def _until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_rank_whose_store_never_answers_ends_at_its_limit(start, exits, capfd, is_waiting):
    store = MemoryStore()
    first, cut_off = start(store, rank=0), start(store)
    _until(lambda: cut_off._first_host == "host0")
    first._ended.set()
    store.lose()
    cut_off.set_status("step 3", limit_seconds=0.2, is_waiting=is_waiting)
    assert exits.event.wait(10)
    assert exits.codes == [1]
    found = capfd.readouterr().err
    assert "error: rank 1 (host1) was in step 3 for more than 0 s" in found
    assert "the store of rank 0 (host0) does not answer: its host, or the network to it, is lost" in found
    assert ("stacks of rank 1" in found) != is_waiting


def test_a_rank_whose_store_never_answers_ends_also_where_work_has_no_limit(start, exits, capfd):
    store = MemoryStore()
    cut_off = start(store, wait_seconds=0.2)
    _until(lambda: cut_off._num_answers > 0)
    cut_off.set_status("preparing data.train")
    store.lose()
    assert exits.event.wait(10)
    assert "rank 1 (host1) in preparing data.train: no answer for" in capfd.readouterr().err


def test_a_wait_is_limited_and_work_only_by_its_own_limit_which_starts_again(start):
    one = start(None, rank=0, size=1, wait_seconds=60.0)
    limits = []
    for arguments in (("load",), (None, None, True), (), ("step 3", 5.0), (None, None, True), (), ("save",)):
        before = one._status.since
        time.sleep(0.001)
        one.set_status(*arguments)
        limits.append(one._status.limit_seconds)
        assert one._status.since > before
    assert limits == [math.inf, 60.0, math.inf, 5.0, 5.0, 5.0, math.inf]


def test_a_rank_that_waits_too_long_outside_of_a_step_ends(start, exits, capfd):
    waiting = start(MemoryStore(), wait_seconds=0.2)
    waiting.set_status("load")
    waiting.set_status(is_waiting=True)
    assert exits.event.wait(10) and exits.codes == [1]
    assert "rank 1 (host1) was in load for more than 0 s, waiting for other ranks" in capfd.readouterr().err


SIGN = {"beat": 3, "host": "host0", "pid": 11, "what": "step 3", "is_waiting": False, "seconds": 4.0, "time": 0.0}
ALL_WAIT = "all ranks are alive and wait for each other: check devices and network"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (SIGN, SIGN, r"rank 0 \(host0, process 11\) was last seen in step 3, about \d+ s ago: it has exited"),
        (SIGN, {**SIGN, "beat": 4}, r"rank 0 \(host0, process 11\) is not waiting: busy with step 3 for 4 s"),
        (SIGN, {**SIGN, "beat": 4, "is_waiting": True}, ALL_WAIT),
        (None, {**SIGN, "is_waiting": True}, ALL_WAIT),  # its first sign came between the two looks
        (None, SIGN, r"rank 0 .* is not waiting"),
        (None, None, "rank 0 was never seen"),
    ],
)
def test_who_is_missing_is_told_by_two_looks(start, first, second, said):
    one = start(MemoryStore())
    looks = iter([[first, None], [second, None]])
    one._look = lambda: next(looks)
    assert re.match(said, one.who_is_missing())


def test_one_of_those_that_wait_reports_and_the_stuck_rank_prints_its_stacks(start, exits, capfd, monkeypatch):
    monkeypatch.setattr(heartbeat, "REPORT_SECONDS", 20.0)
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 1.0)  # on a busy machine a thread may wait for its turn
    store = MemoryStore()
    ranks = [start(store, rank=rank, size=3) for rank in range(3)]
    ranks[0].set_status("step 3", limit_seconds=1000.0)
    for waiting in ranks[1:]:
        waiting.set_status("step 3", limit_seconds=0.2, is_waiting=True)
    _until(lambda: len(exits.codes) == 2)
    said = capfd.readouterr().err
    assert exits.codes == [1, 1] and said.count("was in step 3 for more than") == 1
    assert "rank 0 (host0, process" in said and "is not waiting: busy with step 3" in said
    assert said.count("stacks of rank") == said.count("stacks of rank 0 (host0") == 1


def test_a_stop_signal_to_one_rank_is_one_to_all(start):
    asked = []
    told = SimpleNamespace(name="SIGUSR1", is_listening=True, request=lambda _: pytest.fail("it knows"))
    listening = SimpleNamespace(name=None, is_listening=True, request=asked.append)
    store = MemoryStore()
    ranks = start(store, rank=0, stop=told), start(store, stop=listening)
    _until(lambda: asked and all(one.is_stop_announced for one in ranks))
    assert asked == ["SIGUSR1"]


def test_who_is_missing_has_an_answer_though_the_store_has_none(start):
    store = MemoryStore()
    store.lose()
    assert start(store).who_is_missing() == "rank 0 (its host) does not answer: its host, or the network to it, is lost"


def test_a_failure_reaches_the_other_ranks_with_its_kind_and_text(start):
    store = MemoryStore()
    first, second = start(store, rank=0), start(store)
    first.publish_failure(UserError("line 3 is broken"))  # returns when it was read
    error = second.failure.error()
    assert isinstance(error, UserError) and str(error) == "rank 0 (host0) failed: line 3 is broken"
    with pytest.raises(UserError, match="line 3"):
        second.require_alive()
    second.publish_failure(error)
    assert json.loads(store.get("heartbeat/failure"))[0] == 0, "the consequence took the place of the cause"
    answers = first._num_answers
    _until(lambda: first._num_answers > answers + 1)
    assert first.failure is None, "its own failure came back as that of another"


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_that_fail_of_the_same_at_once_wait_for_nobody(start, monkeypatch, size):
    """None of them would read the failure of another."""
    monkeypatch.setattr(heartbeat, "READ_SECONDS", 600.0)
    store = MemoryStore()
    ranks = [start(store, rank=rank, size=size) for rank in range(size)]
    for one in ranks:
        one.close()  # no thread reads in between
    threads = [
        threading.Thread(target=one.publish_failure, args=(UserError("no such file"),), daemon=True) for one in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_a_failing_rank_waits_for_those_that_live_and_not_for_the_dead(start, monkeypatch):
    monkeypatch.setattr(heartbeat, "READ_SECONDS", 600.0)
    store = MemoryStore()
    first = start(store, rank=0, size=4)
    start(store, rank=1, size=4)
    store.set("heartbeat/2", json.dumps({"beat": 7}))  # was killed; rank 3 has never come
    waiting = threading.Thread(target=first.publish_failure, args=(UserError("line 3 is broken"),), daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive(), "it waits for the dead"
    _until(lambda: store.check(["heartbeat/1/has_read"]))


def test_a_failing_rank_waits_for_one_that_lives_until_it_has_read(start, monkeypatch):
    monkeypatch.setattr(heartbeat, "READ_SECONDS", 600.0)

    class Living(MemoryStore):
        num_beats = 0  # of rank 1: another at every look

        def get(self, key):
            if key != "heartbeat/1":
                return super().get(key)
            self.num_beats += 1
            return json.dumps({"beat": self.num_beats}).encode()

    store = Living()
    store.set("heartbeat/1", "beats")
    first = start(store, rank=0)
    waiting = threading.Thread(target=first.publish_failure, args=(UserError("line 3 is broken"),), daemon=True)
    waiting.start()
    _until(lambda: store.num_beats > 8)
    assert waiting.is_alive(), "it did not wait for a rank that lives"
    store.set("heartbeat/1/has_read", "1")
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_rank_stuck_in_a_collective_ends_with_the_failure_of_another(start, exits, capfd):
    store = MemoryStore()
    first, stuck = start(store, rank=0), start(store)
    stuck.set_status("step 3", is_waiting=True)
    first.publish_failure(UserError("line 3 is broken"))
    assert exits.event.wait(10)
    assert exits.codes == [2]
    assert "error: rank 1 (host1) ends in step 3: rank 0 (host0) failed: line 3 is broken" in capfd.readouterr().err


def test_a_rank_whose_heartbeat_stands_still_is_named_while_others_wait_without_a_limit(start, exits):
    store = MemoryStore()
    sign = {"beat": 7, "host": "host0", "pid": 11, "what": "preparing data.train", "is_waiting": False}
    store.set("heartbeat/0", json.dumps(sign))
    waiting = start(store)
    waiting.require_alive()
    with pytest.raises(Exception, match=r"no sign of life for 0 s from rank 0 \(host0, process 11\) in preparing data"):
        _until(lambda: waiting.require_alive())


def test_the_end_of_the_launcher_asks_one_process_to_stop_once(start, exits):
    asked = []
    stop = SimpleNamespace(name=None, is_listening=True, request=asked.append)
    alone = start(None, rank=0, size=1, launcher=os.getppid(), stop=stop)
    _until(lambda: exits.num_looks >= 3)
    assert asked == []
    exits.parent = 1
    _until(lambda: asked)
    assert not alone._ended.wait(3 * heartbeat.BEAT_SECONDS)
    assert asked == [LAUNCHER_ENDED] and exits.codes == []
    alone.close()


def test_without_a_launcher_and_other_ranks_nothing_is_watched(start):
    assert start(None, rank=0, size=1)._threads == []


def test_a_bounded_call_returns_raises_or_gives_up():
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(MachineFailed, match="full"):
        within(5.0, _raise)
    with pytest.raises(NoAnswer):
        within(0.01, threading.Event().wait)


def _raise():
    raise MachineFailed("full")
