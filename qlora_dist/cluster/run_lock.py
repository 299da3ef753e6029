"""One job at a time in a run directory, also on a network file system, whose own locks cannot be relied on.

The lock is a file that names its holder and that the holder rewrites every few seconds (in place, so that another
host that opens it reads the file server's content). It is stale, and taken over,

    at once                  when the holder was a process of this machine that is dead, or an earlier start of this job
    after missed heartbeats  when it no longer changes, wherever its holder was

Clocks of different hosts are never compared, and no modification time is read. A holder that was suspended so long
that its lock was taken over exits at its next heartbeat.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ..errors import UserError, os_errors, printable

BEAT_SECONDS = 10.0
MISSED_BEATS = 4  # until a lock that does not change is stale
_SIZE = 1024  # bytes; a fixed length, so that a rewrite in place leaves nothing of the previous one
# neither follow a link to somebody else's file, nor wait for the other end of a pipe
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class RunLock:
    """The lock of one run directory; `acquire` and `release` it. Rank 0 only."""

    def __init__(self, file: Path, job: str | None = None, restarts: int = 0, beat_seconds: float = BEAT_SECONDS):
        """`file` is in the run directory. `job`: the scheduler's id of this process's job; `restarts`: how often it was
        requeued."""
        self._file = file
        self._beat_seconds = beat_seconds
        self._token = uuid.uuid4().hex
        self._holder = {
            "token": self._token,
            "job": job,
            "life": restarts,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _start_of(os.getpid()),
        }
        self._beat = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Takes the lock. Raises UserError, after some seconds if necessary, when another job uses the directory, and
        an error of the disk or the user when the file cannot be written."""
        with os_errors(f"taking the lock {self._file}"):
            try:
                os.close(os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                was_there = False
            except FileExistsError:
                self._require_file()
                was_there = True
        if was_there:
            self._require_stale()
        with os_errors(f"writing the lock {self._file}"):
            self._write()
        if was_there:
            time.sleep(min(self._beat_seconds / 5, 1.0))  # two that take over at once: the last to write holds it
        if (other := self._read()) is not None and other["token"] != self._token:
            raise UserError(self._refusal(other))
        self._thread.start()

    def release(self) -> None:
        """Removes the lock if this process holds it."""
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join(5)
            if (holder := self._read()) is not None and holder["token"] == self._token:
                with contextlib.suppress(OSError):
                    self._file.unlink()

    # --- another's lock -----------------------------------------------------------------------------------------------

    def _require_file(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # released in the meantime
            mode = self._file.lstat().st_mode
            if not stat.S_ISREG(mode):
                what = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
                raise UserError(
                    f"{self._file} is {what.get(stat.S_IFMT(mode), 'not a regular file')}, expected the lock file of "
                    "this run; remove it, or choose another run_dir"
                )

    def _require_stale(self) -> None:
        first = self._read()
        if first is not None and self._is_dead(first):
            return
        deadline = time.monotonic() + MISSED_BEATS * self._beat_seconds
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / 5)
            now = self._read()
            if now is None and not self._file.exists():
                return  # released in the meantime
            if now is not None and first is None:
                first = now
            if now != first and now is not None:
                raise UserError(self._refusal(now))

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """What can be decided at once; False: wait for a heartbeat."""
        if (
            holder["job"] is not None
            and holder["job"] == self._holder["job"]
            and holder["life"] != self._holder["life"]
        ):
            return True  # a scheduler restarts a job only after its previous start has ended
        return holder["machine"] == self._holder["machine"] and _start_of(holder["pid"]) != holder["started"]

    def _refusal(self, holder: dict[str, Any]) -> str:
        job = "" if holder["job"] is None else f"job {holder['job']}, "
        return (
            f"run_dir {self._file.parent} is in use by {job}process {holder['pid']} on {holder['host']}, which is "
            "alive; wait until it ends, cancel it, or choose another run_dir"
        )

    # --- own lock -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            holder = self._read()
            if holder is not None and holder["token"] != self._token:
                print(
                    printable(
                        f"error: run_dir {self._file.parent} was taken over by process {holder['pid']} on "
                        f"{holder['host']} while this process was suspended; it exits now and writes nothing more"
                    ),
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            with contextlib.suppress(OSError):  # a full disk, an unreachable file server: the run will report it
                self._write()

    def _write(self) -> None:
        self._beat += 1
        text = json.dumps({**self._holder, "beat": self._beat}).encode().ljust(_SIZE)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | _SAFELY, 0o644)
        try:
            os.pwrite(descriptor, text, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read(self) -> dict[str, Any] | None:
        """The holder named in the file; None while it is being written, without a file, or when it is no lock."""
        try:
            descriptor = os.open(self._file, os.O_RDONLY | _SAFELY)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return None
                holder: Any = json.loads(os.pread(descriptor, _SIZE, 0))
            finally:
                os.close(descriptor)
        except (OSError, ValueError, RecursionError):
            return None
        return holder if isinstance(holder, dict) and self._is_holder(holder) else None

    def _is_holder(self, found: dict[str, Any]) -> bool:
        return (
            self._holder.keys() <= found.keys()
            and all(isinstance(found[key], str) for key in ("token", "host", "machine"))
            and all(isinstance(found[key], str | None) for key in ("job", "started"))
            and type(found["pid"]) is int
        )


def _machine() -> str:
    """Identifies the process-id namespace: this boot of this machine, and its container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()} {uuid.uuid4().hex}"  # unknown: never equal, so heartbeats decide


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, None if it does not exist: process ids are reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, IndexError):
        return None
    return None if fields[0] == "Z" else fields[19]
