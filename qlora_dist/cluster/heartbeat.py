"""A heartbeat of every rank in the job's store, and the diagnosis when the ranks no longer advance together.

One thread per rank talks to the store, once per second:

    publishes what this rank is doing (`step 12`, waiting for the others or not)
    forwards to this process a stop signal that any rank received
    reads why another rank has failed

Another only looks at the clock, because a call to a store whose host is cut off does not return:

    this rank exceeds its time limit: one rank then names those that did not arrive, each stuck rank prints its stacks,
    and all exit. A launcher cannot know any of this, and NCCL's watchdog names no rank
    the store no longer answers, or another rank has failed and this one is stuck in a collective: exits
    the launcher has ended: this process asks itself to stop, also where it is the only one

A rank whose heartbeat does not change between two readings is stopped, killed, or its host is lost; clocks of
different hosts are never compared.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from ..errors import RunFailed, UserError, pack_error, printable, unpack_error
from .bounded import NoAnswer, within
from .stop_signal import LAUNCHER_ENDED, StopSignal

BEAT_SECONDS = 1.0
LOOK_SECONDS = 3 * BEAT_SECONDS  # between two readings of the others' heartbeats
STORE_SECONDS = 5.0  # for one call of the store
REPORT_SECONDS = 15.0  # for naming those that are missing, after a limit
READ_SECONDS = 5.0  # for the others to read why this rank has failed
FAILURE_BEATS = 10  # until a rank that is stuck after another's failure exits
SILENT_SECONDS = 60.0  # a heartbeat may pause while one call holds the interpreter
NAMED_RANKS = 8  # in a message


class Store(Protocol):
    """The needed part of torch's key-value store; a connection of the thread's own."""

    def set(self, key: str, value: str) -> Any: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, amount: int) -> int: ...


class Status(NamedTuple):
    """What this rank is doing, since when (monotonic), and its time limit."""

    what: str
    is_waiting: bool  # for other ranks, in a collective
    since: float
    limit_seconds: float


class Failure(NamedTuple):
    """Why another rank has failed."""

    rank: int
    host: str
    kind: str  # as `pack_error` names it
    text: str

    def error(self) -> UserError | RunFailed:
        """The same error for this rank, naming the other."""
        return unpack_error(self.kind, f"rank {self.rank} ({self.host}) failed: {self.text}")


class Heartbeat:
    """This rank's heartbeat. `store` None (one process): only the launcher is watched."""

    def __init__(
        self,
        store: Store | None,
        rank: int,
        size: int,
        host: str,
        stop: StopSignal,
        wait_seconds: float,
        launcher: int | None = None,
    ) -> None:
        """`wait_seconds`: longest wait for other ranks in an activity without a limit of its own. `launcher`: the
        process id of this process's parent, if its end is to stop this process.
        """
        self._store, self._rank, self._size, self._host, self._stop = store, rank, size, host, stop
        self._launcher = launcher
        self.failure: Failure | None = None  # of another rank
        self.is_stop_announced = False  # by any rank
        self._is_failing = False  # this rank, or another whose failure this one reports
        self._num_answers = 0  # of the store
        self._beats: dict[int, tuple[int, float]] = {}  # rank -> its last beat and when it was first seen
        self._wait_seconds = wait_seconds
        self._limit_seconds: float | None = None
        self._status = Status("start", False, time.monotonic(), math.inf)
        self._ended = threading.Event()
        self._has_dumped = False
        self._first_host = "its host"
        self._threads = []
        if store is not None:
            self._threads.append(threading.Thread(target=self._beat, name="heartbeat", daemon=True))
        if store is not None or launcher is not None:
            self._threads.append(threading.Thread(target=self._watch_clock, name="clock", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def what(self) -> str:
        """What this rank is doing."""
        return self._status.what

    def set_status(self, what: str | None = None, limit_seconds: float | None = None, is_waiting: bool = False) -> None:
        """From now on this rank does `what` (None: what it did before), and waits for other ranks in it or not.

        Without `limit_seconds` only waiting is limited: nobody can say how long loading takes. Costs a microsecond.
        """
        if what is not None:
            self._limit_seconds = limit_seconds
        limit = self._limit_seconds
        if limit is None:
            limit = self._wait_seconds if is_waiting else math.inf
        self._status = Status(self._status.what if what is None else what, is_waiting, time.monotonic(), limit)

    def close(self) -> None:
        """Before the process group ends."""
        self._ended.set()
        for thread in self._threads:
            thread.join(STORE_SECONDS)

    def publish_failure(self, error: BaseException) -> None:
        """Tells the other ranks why this one ends, and waits until those that live have read it, for some seconds.

        The first failure counts.
        """
        if self._store is None or self._is_failing:
            return
        self._is_failing = True
        store, (kind, text) = self._store, pack_error(error)
        if not isinstance(error, UserError | RunFailed):  # a defect, or a library's
            text = f"{type(error).__name__}: {text}"

        def publish() -> None:
            if store.add("heartbeat/failures", 1) > 1:
                self._confirm_failure()  # it ends in any case: often all ranks fail of the same, at once
                return
            store.set("heartbeat/failure", json.dumps(Failure(self._rank, self._host, kind, text)))
            self._await_readers(store)

        with suppress(RuntimeError):
            within(READ_SECONDS, publish)

    def _await_readers(self, store: Store) -> None:
        """Returns when every rank whose heartbeat goes on has read this one's failure. A killed one never does."""
        waiting_for = [f"heartbeat/{rank}" for rank in range(self._size) if rank != self._rank]
        while waiting_for:
            before = self._beats_of(waiting_for)
            until = time.monotonic() + LOOK_SECONDS
            while not store.check([f"{sign}/has_read" for sign in waiting_for]):
                if time.monotonic() > until:
                    break
                time.sleep(BEAT_SECONDS / 20)
            now = self._beats_of(waiting_for)
            waiting_for = [
                sign for sign in waiting_for if now[sign] != before[sign] and not store.check([f"{sign}/has_read"])
            ]

    def require_alive(self) -> None:
        """Raises when another rank has failed, or when its heartbeat has stopped. While this rank waits for others."""
        if self.failure is not None:
            raise self.failure.error()
        now, silent = time.monotonic(), []
        for rank, sign in enumerate(self._look() or []):
            if sign is None or rank == self._rank:
                continue
            if self._beats.get(rank, (None, now))[0] != sign["beat"]:
                self._beats[rank] = (sign["beat"], now)
            elif now - self._beats[rank][1] > SILENT_SECONDS:
                silent.append(f"rank {rank} ({sign['host']}, process {sign['pid']}) in {sign['what']}")
        if silent:
            raise RunFailed(
                f"no sign of life for {SILENT_SECONDS:.0f} s from {'; '.join(silent[:NAMED_RANKS])}: it has exited, is "
                "stopped, or its host is lost. Start the same command again to resume from the newest checkpoint"
            )

    def who_is_missing(self) -> str:
        """Reads all heartbeats twice: which ranks are silent or elsewhere, or that all are waiting. Takes seconds."""
        try:
            return within(LOOK_SECONDS + 2 * STORE_SECONDS, self._who_is_missing)
        except NoAnswer:
            return f"rank 0 ({self._first_host}) does not answer: its host, or the network to it, is lost"

    def _who_is_missing(self) -> str:
        first = self._look()
        time.sleep(LOOK_SECONDS)
        second = self._look()
        if second is None:
            return f"rank 0 ({self._first_host}) has exited: its store does not answer"
        silent, elsewhere = [], []
        for rank, sign in enumerate(second):
            if rank == self._rank:
                continue
            if sign is None:
                silent.append(f"rank {rank} was never seen")
                continue
            name = f"rank {rank} ({sign['host']}, process {sign['pid']})"
            before = first[rank] if first is not None else None
            if before is not None and before["beat"] == sign["beat"]:
                age = max(time.time() - sign["time"], 0.0)
                what = f"was last seen in {sign['what']}, about {age:.0f} s ago"
                silent.append(f"{name} {what}: it has exited, is stopped, or its host is lost")
            elif not sign["is_waiting"]:
                elsewhere.append(f"{name} is not waiting: busy with {sign['what']} for {sign['seconds']:.0f} s")
        found = silent or elsewhere or ["all ranks are alive and wait for each other: check devices and network"]
        more = [f"and {len(found) - NAMED_RANKS} more"] if len(found) > NAMED_RANKS else []
        return "; ".join(found[:NAMED_RANKS] + more)

    # --- the thread that talks to the store ---------------------------------------------------------------------------

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS if beat else 0.0):
            beat += 1
            try:
                self._publish(beat)
                self._forward_stop()
                self._read_failure()
                self._num_answers += 1
            except RuntimeError:
                # the store is gone: rank 0 has exited, and this rank will notice in its next collective
                if self._ended.wait(BEAT_SECONDS):
                    return

    def _forward_stop(self) -> None:
        assert self._store is not None
        if self.is_stop_announced:
            return
        if self._stop.name is not None:
            self._store.set("heartbeat/stop", self._stop.name)
            self.is_stop_announced = True
        elif self._store.check(["heartbeat/stop"]):
            if self._stop.is_listening:
                self._stop.request(self._store.get("heartbeat/stop").decode())
            self.is_stop_announced = True

    def _read_failure(self) -> None:
        assert self._store is not None
        if self._store.check([f"heartbeat/dump/{self._rank}"]):
            self._dump("another rank waits for it")
        if self.failure is None and self._store.check(["heartbeat/failure"]):
            failure = Failure(*json.loads(self._store.get("heartbeat/failure")))
            if failure.rank != self._rank:
                self.failure = failure
                self._confirm_failure()

    def _confirm_failure(self) -> None:
        """To the first rank that failed, which waits for it."""
        assert self._store is not None
        self._store.set(f"heartbeat/{self._rank}/has_read", "1")

    def _publish(self, beat: int) -> None:
        assert self._store is not None
        status = self._status
        sign = {
            "beat": beat,
            "host": self._host,
            "pid": os.getpid(),
            "what": status.what,
            "is_waiting": status.is_waiting,
            "seconds": time.monotonic() - status.since,
            "time": time.time(),
        }
        self._store.set(f"heartbeat/{self._rank}", json.dumps(sign))
        if beat == 2 and self._store.check(["heartbeat/0"]):
            self._first_host = json.loads(self._store.get("heartbeat/0"))["host"]

    def _look(self) -> list[dict[str, Any] | None] | None:
        """Every rank's last heartbeat, None for a rank without one; None when the store is gone."""
        assert self._store is not None
        try:
            keys = [f"heartbeat/{rank}" for rank in range(self._size)]
            return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]
        except RuntimeError:
            return None

    def _beats_of(self, signs: list[str]) -> dict[str, int | None]:
        """The last beat of each of these ranks (their keys), None for a rank without one."""
        store = self._store
        assert store is not None
        return {sign: json.loads(store.get(sign))["beat"] if store.check([sign]) else None for sign in signs}

    # --- the thread that looks at the clock, and does not call the store ----------------------------------------------

    def _watch_clock(self) -> None:
        # counted in beats of this thread: a process that was suspended has not waited
        num_answers, silent_beats, failed_beats = 0, 0, 0
        limit_beats = max(self._wait_seconds, SILENT_SECONDS) / BEAT_SECONDS
        while not self._ended.wait(BEAT_SECONDS):
            if self._launcher is not None and os.getppid() != self._launcher and self._stop.is_listening:
                self._launcher = None
                self._stop.request(LAUNCHER_ENDED)
            if self._store is None:
                continue
            status = self._status
            silent_beats = 0 if self._num_answers != num_answers else silent_beats + 1
            num_answers = self._num_answers
            failed_beats += self.failure is not None and not self._is_failing
            if time.monotonic() - status.since > status.limit_seconds:
                self._give_up(status)
            elif silent_beats > limit_beats:
                self._exit(
                    f"in {status.what}: no answer for {silent_beats * BEAT_SECONDS:.0f} s from the job's store on the "
                    f"host of rank 0 ({self._first_host}), which has exited, or the network to it is lost"
                )
            elif self.failure is not None and failed_beats > FAILURE_BEATS:
                error = self.failure.error()
                self._exit(f"ends in {status.what}: {error}", error.exit_code)

    def _give_up(self, status: Status) -> None:
        """Exits, so that the launcher ends all ranks. One rank reports for those that wait."""
        limit = f"{status.limit_seconds:.0f} s"
        what = f"was in {status.what} for more than {limit}{', waiting for other ranks' if status.is_waiting else ''}"
        if not status.is_waiting:
            self._dump(f"for more than {limit} in {status.what}")
        try:
            within(REPORT_SECONDS, lambda: self._report(what, status.is_waiting))
        except RuntimeError as error:
            where = "its host, or the network to it, is lost" if isinstance(error, NoAnswer) else "it has exited"
            self._exit(
                f"{what}; the store of rank 0 ({self._first_host}) does not answer: {where}. Start the same command "
                "again to resume from the newest checkpoint"
            )
        os._exit(1)

    def _report(self, what: str, is_waiting: bool) -> None:
        assert self._store is not None
        if self._store.add("heartbeat/speaker", 1) > 1:
            deadline = time.monotonic() + 10 * BEAT_SECONDS
            while not self._store.check(["heartbeat/spoken"]) and time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 2)
            return
        missing = self._who_is_missing()
        for rank, sign in enumerate(self._look() or []):
            if sign is not None and not sign["is_waiting"]:
                self._store.set(f"heartbeat/dump/{rank}", "1")
        if is_waiting and "all ranks are alive" in missing:
            self._dump("all ranks wait")
        self._print(
            f"{what}; {missing}. All ranks exit; start the same command again to resume from the newest checkpoint. If "
            "a step may take that long, raise strategy.timeout_seconds"
        )
        time.sleep(LOOK_SECONDS)  # for the stuck ranks to print their stacks
        self._store.set("heartbeat/spoken", "1")

    def _exit(self, text: str, code: int = 1) -> None:
        self._print(text)
        os._exit(code)

    def _print(self, text: str) -> None:
        print(printable(f"error: rank {self._rank} ({self._host}) {text}"), file=sys.stderr, flush=True)

    def _dump(self, why: str) -> None:
        if self._has_dumped:
            return
        self._has_dumped = True
        print(f"stacks of rank {self._rank} ({self._host}, process {os.getpid()}): {why}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
