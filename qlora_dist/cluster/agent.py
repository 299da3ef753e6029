"""`python -m qlora_dist.cluster.agent OPTIONS`: torchrun, which also holds the port that it has chosen for rank 0's
store, says in words that nodes did not meet, and ends where it is cut off from the first node.

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
from datetime import timedelta

import psutil

from ..errors import MachineFailed, printable
from .bounded import within
from .store_port import hold_free_port

LOOK_SECONDS = 3.0
STUCK_SECONDS = 30.0  # torchrun looks ten times a second
ANSWER_SECONDS = 8.0


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


def run() -> int:
    """torchrun, on the command line's options; returns the exit code."""
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.elastic.rendezvous import api as rendezvous
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import DEFAULT_PORT
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
    from torch.distributed.run import main, parse_args

    held: list[socket.socket] = []
    rendezvous.get_free_port = lambda: hold_free_port(held)
    try:
        require_store(*parse_rendezvous_endpoint(parse_args(None).rdzv_endpoint, DEFAULT_PORT))
        main()
        return 0
    except MachineFailed as error:
        why = str(error)
    except RendezvousError as error:
        causes = [text for one in (error, error.__cause__) if one is not None and (text := str(one).strip())]
        why = f"it has not met the other nodes: {' '.join(text.splitlines()[0] for text in causes) or repr(error)}"
    print(
        printable(
            f"error: torchrun on {socket.gethostname()}: {why}. Check that every node was started with the same first "
            "node, port, --nnodes and --rdzv-id, and what the output of the others says"
        ),
        file=sys.stderr,
        flush=True,
    )
    return 1


def require_store(host: str, port: int, seconds: float = ANSWER_SECONDS) -> None:
    """Whoever listens there must be torchrun: waiting for another program's answer, it would hang for good.

    Raises MachineFailed. Nobody may listen there yet, where this node is the one to do so.
    """
    from torch.distributed import TCPStore

    try:
        socket.create_connection((host, port), seconds).close()
    except OSError:
        return
    limit = timedelta(seconds=seconds)
    try:
        within(seconds, lambda: TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False))
    except RuntimeError as error:
        cause = (str(error).strip() or repr(error)).splitlines()[0]
        raise MachineFailed(
            f"another program than torchrun listens at {host}:{port}, where the nodes meet ({cause}): give another "
            "port, the same on all nodes"
        ) from error


if __name__ == "__main__":
    threading.Thread(target=exit_if_stuck, name="stuck agent", daemon=True).start()
    if code := run():
        sys.stdout.flush()
        os._exit(code)  # a call that got no answer may still wait in a thread
