"""`python -m qlora_dist.cluster.agent OPTIONS`: torchrun, which also ends where it is cut off from the first node.

torchrun asks the store of the first node whether other nodes wait, before it looks at its own ranks. When that
node or the network to it is lost, the call returns only when the kernel gives up the connection, after a quarter of an
hour. The ranks themselves have ended by then, so this node would be held for nothing.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

import psutil

from ..errors import printable

LOOK_SECONDS = 3.0
STUCK_SECONDS = 30.0  # torchrun looks ten times a second


def exit_if_stuck(seconds: float = STUCK_SECONDS, look_seconds: float = LOOK_SECONDS) -> None:
    """Never returns. Ends this process once all of its children have ended and it has not noticed for `seconds`."""
    looks = 0  # counted, not timed: a process that was suspended has not had the time to notice
    while looks * look_seconds < seconds:
        time.sleep(look_seconds)
        children = psutil.Process().children()
        looks = looks + 1 if children and all(map(_has_ended, children)) else 0
    print(
        printable(
            f"error: torchrun on {socket.gethostname()} has not noticed for {seconds:.0f} s that all ranks of this "
            "node have ended, as they say above: the first node, or the network to it, is lost. It exits"
        ),
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _has_ended(process: psutil.Process) -> bool:
    """Whether a child only waits for its parent to read its exit code."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # the parent has just read it
        return False


if __name__ == "__main__":
    threading.Thread(target=exit_if_stuck, name="stuck agent", daemon=True).start()
    from torch.distributed.run import main

    main()
