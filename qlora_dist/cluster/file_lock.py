"""One process builds, the others wait: a file lock that the system releases when its holder dies."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_LOG_EVERY_SECONDS = 60.0


@contextmanager
def build_lock(
    folder: Path, timeout_seconds: float = 6 * 3600, what: str = "tokenizing the same data"
) -> Iterator[None]:
    """Holds the lock of a store's folder. Logs once per minute while it waits, and gives up after hours."""
    with (folder.parent / f".{folder.name}.lock").open("a+") as file:
        started, logged = time.monotonic(), -_LOG_EVERY_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - started
            except OSError as error:  # a file system without locks: only the atomic rename keeps the store intact
                logger.warning("no file locks in %s (%s): several processes may be %s", folder, error, what)
                break
            if waited - logged >= _LOG_EVERY_SECONDS:
                file.seek(0)
                holder = file.read() or "another process"
                logger.warning("waiting for %s, which is %s (%.0f s so far)", holder, what, waited)
                logged = waited
            if waited > timeout_seconds:
                raise UserError(
                    f"waited {waited / 3600:.1f} hours for another process that is {what} into {folder}; if none is, "
                    f"remove {file.name} and start again"
                )
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
