"""Folders that are made once and used by many: one process builds, the others wait for a lock that dies with it."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError, os_errors
from ..files import DamagedFolder, other_writers, remove_folder

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_LOG_EVERY_SECONDS = 60.0


def build_once(
    folder: Path, *, check: Callable[[], None], build: Callable[[], object], what: str, setting: str
) -> None:
    """Leaves a folder that `check` accepts: the one that is there, or what `build` writes.

    `check` raises DamagedFolder for a folder that is missing or not whole; that is then removed and built again.
    `build` makes the folder appear under its name at once, and raises OSError when one is there already: where file
    locks do not work, another process may have been quicker, and its folder is used. `what`: what is being done, for
    those who wait; `setting`: the key of the config that names the folder above, for errors.
    """
    root = folder.parent
    with os_errors(f"{setting} {root}: a writable folder is needed"):
        root.mkdir(parents=True, exist_ok=True)
    if _damage(check) is None:
        if others := other_writers(folder):
            logger.warning(
                "%s is as its manifest says, but others could have written both (%s). If you do not trust them, set "
                "%s to a folder of your own, or take these rights away (chmod -R o-w)",
                folder, others, setting,
            )  # fmt: skip
        return
    with build_lock(folder, what, setting):
        damage = _damage(check)  # another process may have built it while this one waited
        if damage is None:
            return
        if os.path.lexists(folder):
            logger.warning("%s is not whole (%s); it is built again", folder, damage)
            with os_errors(f"{setting}: {folder} is damaged and cannot be replaced"):
                remove_folder(folder)
        try:
            build()
        except Exception:
            if not folder.exists() or _damage(check) is not None:
                raise
            logger.info("%s: another process has built it meanwhile", folder)


def _damage(check: Callable[[], None]) -> str | None:
    try:
        check()
    except DamagedFolder as error:
        return str(error)
    return None


@contextmanager
def build_lock(
    folder: Path, what: str, setting: str = "the cache", timeout_seconds: float = 6 * 3600
) -> Iterator[None]:
    """Holds the lock of a folder that is being built. Logs once per minute while it waits, and gives up after hours."""
    path = folder.parent / f".{folder.name}.lock"
    with os_errors(f"{setting}: the lock of {folder.name} cannot be opened"):
        descriptor = _open_for_all(path)
    try:
        _acquire(descriptor, path, what, timeout_seconds)
        with suppress(OSError):  # a lock of another user's may be read-only
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open_for_all(path: Path) -> int:
    """A lock file that all users of a shared folder can lock: an exclusive lock may need the right to write."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # not what a link leads to; a pipe does not block
    for access in (
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR,
        os.O_RDONLY,
    ):  # O_CREAT alone can be refused in a folder like /tmp
        try:
            descriptor = os.open(path, flags | access, 0o666)
            break
        except PermissionError:
            if access == os.O_RDONLY:
                raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a file, where a lock file is expected; remove it")
    if status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) != 0o666:
        with suppress(OSError):
            os.fchmod(descriptor, 0o666)  # whatever the umask: it holds nothing but who is at work
    return descriptor


def _acquire(descriptor: int, path: Path, what: str, timeout_seconds: float) -> None:
    started, logged = time.monotonic(), -_LOG_EVERY_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - started
        except OSError as error:  # a file system without locks: only the atomic rename keeps the folder intact
            logger.warning("no file locks in %s (%s): several processes may be %s", path.parent, error, what)
            return
        if waited - logged >= _LOG_EVERY_SECONDS:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            logger.warning("waiting for %s, which is %s (%.0f s so far)", holder, what, waited)
            logged = waited
        if waited > timeout_seconds:
            raise UserError(
                f"waited {waited / 3600:.1f} hours for another process that is {what} into {path.parent}; if none is, "
                f"remove {path} and start again"
            )
        time.sleep(_POLL_SECONDS)
