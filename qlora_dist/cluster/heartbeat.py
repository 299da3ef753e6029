"""A heartbeat of every rank in the job's store, and the diagnosis when the ranks no longer advance together.

One thread per rank, once per second:

    publishes what this rank is doing (`step 12`, waiting for the others or not)
    forwards to this process a stop signal that any rank received
    notices when this rank exceeds its time limit: one rank then names those that did not arrive, each stuck rank
    prints its stacks, and all exit. A launcher cannot know any of this, and NCCL's watchdog names no rank

A rank whose heartbeat does not change between two readings is stopped, killed, or its host is lost; clocks of
different hosts are never compared.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from typing import Any, NamedTuple, Protocol

from .stop_signal import StopSignal

BEAT_SECONDS = 1.0
LOOK_SECONDS = 3 * BEAT_SECONDS  # between two readings of the others' heartbeats
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


class Heartbeat:
    """This rank's heartbeat. `store` None (one process): publishes and watches nothing."""

    def __init__(
        self, store: Store | None, rank: int, size: int, host: str, stop: StopSignal, wait_seconds: float
    ) -> None:
        """`wait_seconds`: longest wait for other ranks in an activity without a limit of its own."""
        self._store, self._rank, self._size, self._host, self._stop = store, rank, size, host, stop
        self._wait_seconds = wait_seconds
        self._limit_seconds: float | None = None
        self._status = Status("start", False, time.monotonic(), math.inf)
        self._ended = threading.Event()
        self._has_dumped = False
        self._first_host = "its host"
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        if store is not None:
            self._thread.start()

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
        if self._thread.is_alive():
            self._thread.join(5)

    def who_is_missing(self) -> str:
        """Reads all heartbeats twice: which ranks are silent or elsewhere, or that all are waiting. Takes seconds."""
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

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._store is not None
        beat, has_announced = 0, False
        while not self._ended.wait(BEAT_SECONDS if beat else 0.0):
            beat += 1
            try:
                self._publish(beat)
                if self._stop.name is not None and not has_announced:
                    has_announced = True
                    self._store.set("heartbeat/stop", self._stop.name)
                elif self._stop.is_listening and self._stop.name is None and self._store.check(["heartbeat/stop"]):
                    name = self._store.get("heartbeat/stop").decode()
                    os.kill(os.getpid(), signal.Signals[name])  # its handler runs in the main thread
                if self._store.check([f"heartbeat/dump/{self._rank}"]):
                    self._dump("another rank waits for it")
            except RuntimeError:
                # the store is gone: rank 0 has exited, and this rank will notice in its next collective
                if self._ended.wait(BEAT_SECONDS):
                    return
            status = self._status
            if time.monotonic() - status.since > status.limit_seconds:
                self._give_up(status)

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

    def _give_up(self, status: Status) -> None:
        """Exits, so that the launcher ends all ranks. One rank reports for those that wait."""
        assert self._store is not None
        limit = f"{status.limit_seconds:.0f} s"
        if not status.is_waiting:
            self._dump(f"for more than {limit} in {status.what}")
        try:
            if self._store.add("heartbeat/speaker", 1) == 1:
                missing = self.who_is_missing()
                for rank, sign in enumerate(self._look() or []):
                    if sign is not None and not sign["is_waiting"]:
                        self._store.set(f"heartbeat/dump/{rank}", "1")
                if status.is_waiting and "all ranks are alive" in missing:
                    self._dump("all ranks wait")
                print(
                    f"error: rank {self._rank} ({self._host}) was in {status.what} for more than {limit}"
                    f"{', waiting for other ranks' if status.is_waiting else ''}; {missing}. All ranks exit; start "
                    "the same command again to resume from the newest checkpoint. If a step may take that long, raise "
                    "strategy.timeout_seconds",
                    file=sys.stderr,
                    flush=True,
                )
                time.sleep(LOOK_SECONDS)  # for the stuck ranks to print their stacks
                self._store.set("heartbeat/spoken", "1")
            else:
                deadline = time.monotonic() + 10 * BEAT_SECONDS
                while not self._store.check(["heartbeat/spoken"]) and time.monotonic() < deadline:
                    time.sleep(BEAT_SECONDS / 2)
        except RuntimeError:
            print(
                f"error: rank {self._rank} ({self._host}) was in {status.what} for more than {limit}; rank 0 "
                f"({self._first_host}) has exited: its store does not answer",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    def _dump(self, why: str) -> None:
        if self._has_dumped:
            return
        self._has_dumped = True
        print(f"stacks of rank {self._rank} ({self._host}, process {os.getpid()}): {why}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
