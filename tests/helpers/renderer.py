"""The process that renders chat templates, for a rank that was forked: forked too, instead of a fresh interpreter.

What the fresh one does is tested in test_templates_limits, and by ranks that a launcher starts.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from typing import IO, Any

import torch


@dataclass
class _Forked:
    """What `limited` uses of a Popen object."""

    pid: int
    stdin: IO[bytes]
    stdout: IO[bytes]
    returncode: int | None = None

    def wait(self) -> int:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def stand_by() -> None:
    """Forks the renderer of this process, which must still have one thread. It ends with this process."""
    if torch.cuda.is_available():  # then ranks are fresh interpreters: what the renderer needs is not imported yet
        return
    from qlora_dist.data.templates import limited

    requests, to_renderer = os.pipe()
    from_renderer, answers = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(requests, 0)
        os.dup2(answers, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # a pipe that stayed open here would outlive its owner
        sys.stdin = os.fdopen(0)
        limited.serve()
        os._exit(0)
    os.close(requests)
    os.close(answers)
    child: Any = object.__new__(limited._Child)
    child.owner, child.lock = os.getpid(), threading.Lock()
    child.process = _Forked(pid, os.fdopen(to_renderer, "wb"), os.fdopen(from_renderer, "rb"))
    limited._child = child
