"""`python -m qlora_dist.cluster.agent OPTIONS`: torchrun, which also holds the port that it has chosen for rank 0's
store, lets its ranks have the last word, says in words that nodes did not meet, and ends where it is cut off from the
first node.

Why a rank failed is said by that rank. torchrun would add its own traceback, and end with exit code 1 for every reason;
here only a rank that could say nothing (a signal ended it) is reported, and its exit code is kept.

torchrun asks the store of the first node whether other nodes wait, before it looks at its own ranks. When that
node or the network to it is lost, the call returns only when the kernel gives up the connection, after a quarter of an
hour. The ranks themselves have ended by then, so this node would be held for nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from types import FrameType
from typing import Any

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


def run(options: list[str]) -> int:
    """Runs torchrun; returns its exit code: that of the first rank that failed, 128 + N for signal N, 1 where nodes did
    not meet."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    if "--signals-to-handle=SIGQUIT" in options:
        forward_signals()
    try:
        torchrun(options)
        return 0
    except ChildFailedError as error:
        rank, failure = decisive(error.failures)
        if failure.exitcode > 0:
            return failure.exitcode
        code = 128 - failure.exitcode
        text = (
            f"rank {rank} (process {failure.pid} on {socket.gethostname()}) was ended by {failure.signal_name()}; "
            "SIGKILL often comes from the kernel, when host memory is used up (dmesg)"
        )
    except (MachineFailed, RendezvousError) as error:
        code, why = 1, str(error)
        if isinstance(error, RendezvousError):
            causes = [said for one in (error, error.__cause__) if one is not None and (said := str(one).strip())]
            why = f"it has not met the other nodes: {' '.join(said.splitlines()[0] for said in causes) or repr(error)}"
        text = (
            f"torchrun on {socket.gethostname()}: {why}. Check that every node was started with the same first node, "
            "port, --nnodes and --rdzv-id, and what the output of the others says"
        )
    print(printable(f"error: {text}"), file=sys.stderr, flush=True)
    return code


def torchrun(options: list[str]) -> None:
    """torch's own, with rank 0's port held and without its account of what the ranks have said.

    Raises ChildFailedError or RendezvousError, and MachineFailed where another program serves the meeting place.
    """
    from torch.distributed.elastic.rendezvous import api as rendezvous
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import DEFAULT_PORT
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
    from torch.distributed.run import main, parse_args

    held: list[socket.socket] = []
    rendezvous.get_free_port = lambda: hold_free_port(held)
    for name in ("api", "errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").addFilter(_is_news)
    if endpoint := parse_args(options).rdzv_endpoint:  # none: all ranks are on this node
        require_store(*parse_rendezvous_endpoint(endpoint, DEFAULT_PORT))
    with tempfile.TemporaryDirectory(prefix="qlora_dist-") as folder:  # torchrun would leave one behind
        main([f"--log-dir={folder}", *options])


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


def decisive(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """(rank, torchrun's account) of the failure that the others follow from: one that said why, else another exit, else
    a signal that is not the SIGTERM by which torchrun ends the others; the first of these."""

    def order(rank: int) -> tuple[bool, bool, bool, int]:
        one = failures[rank]
        return not isinstance(one.message, dict), one.exitcode < 0, one.exitcode == -signal.SIGTERM, one.timestamp

    rank = min(failures, key=order)
    return rank, failures[rank]


def _is_news(record: logging.LogRecord) -> bool:
    return not record.msg.startswith(("failed (exitcode", "Sending process", "no error file"))


def forward_signals() -> None:
    """Stop signals go to the ranks, which save and end; then torchrun ends. Its own handling kills them after 30 s.

    Ctrl-C reaches them from the terminal: they get SIGTERM, which asks for the same. A second one would exit at once.
    """

    def forward(number: int, _: FrameType | None) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored on purpose, as under nohup
            signal.signal(number, forward)


if __name__ == "__main__":
    threading.Thread(target=exit_if_stuck, name="stuck agent", daemon=True).start()
    if code := run(sys.argv[1:]):
        sys.stdout.flush()
        os._exit(code)  # a call that got no answer may still wait in a thread
