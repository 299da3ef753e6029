"""Chat templates of a model repository or a user's file run in a process with limits on time and memory.

A template is a program: nested loops, a width of a billion characters and doubled strings run for ever or take all
memory, and whether they do may depend on the conversation. So each such text is rendered in one child process,
which is started once and ends with this one. A conversation that exceeds the limits ends the child, not the run.
The child renders by transformers' own function, in its sandbox; the package's own templates do not need it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import MachineFailed

# of one conversation; ordinary ones take milliseconds and a few MiB
MAX_SECONDS = 10  # of processor time
MAX_BYTES = 2**30
MAX_CHARACTERS = 2**26

# modules come from where this process has them, not from the current folder, which may hold anything
_SERVE = "import sys; sys.path[:] = sys.argv[1:]; from qlora_dist.data.templates.limited import serve; serve()"


class LimitExceeded(Exception):
    """What a template took too much of."""


class Rejected(Exception):
    """The template raised an error of its own."""


class _Child:
    """The process, as seen from its parent."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, *filter(None, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, request: bytes) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.lock:
            try:
                self.process.stdin.write(request)
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = b""
        if answer.endswith(b"\n"):
            result: dict[str, Any] = json.loads(answer)
            return result
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        code = self.process.wait()
        if code == -signal.SIGPROF:
            return {"limit": f"more than {MAX_SECONDS} s of processor time"}
        raise MachineFailed(
            f"the process that renders chat templates has ended (exit code {code}); start the command again. If it "
            "ends again, look for the kernel's reason in dmesg, such as too little memory"
        )


_child: _Child | None = None


def render_limited(source: str, messages: Sequence[Mapping[str, Any]], tools: Any, variables: Mapping[str, Any]) -> str:
    """The text of a conversation, rendered in the child. Raises LimitExceeded, or Rejected with the template's error.

    `variables`: what the template may read besides messages and tools.
    """
    global _child
    given = {"conversations": [messages], "tools": tools, "chat_template": source, **variables}
    try:
        request = json.dumps(given, default=str).encode()
    except (RecursionError, ValueError) as error:  # nested too deeply, numbers of thousands of digits
        raise Rejected(str(error)) from None
    # a fork has its parent's handle, but must not share its pipe
    if _child is None or _child.owner != os.getpid() or _child.process.returncode is not None:
        _child = _Child()
    result = _child.ask(b"%g %s\n" % (MAX_SECONDS, request))
    if "limit" in result:
        raise LimitExceeded(result["limit"])
    if "error" in result:
        raise Rejected(result["error"])
    text: str = result["text"]
    return text


# --- in the child -----------------------------------------------------------------------------------------------------


def serve() -> None:
    """Renders what comes in until the parent closes the pipe or a limit ends the process.

    A line holds the seconds that it may take and the arguments as JSON; the answer is one JSON object.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not print between the answers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a stop is the parent's to decide: it closes the pipe
    _limit_memory()
    for line in sys.stdin.buffer:
        # the default action of this signal ends the process wherever it is, in one long string operation as well
        seconds, _, request = line.partition(b" ")
        signal.setitimer(signal.ITIMER_PROF, float(seconds))
        answers.write(_answer(request, render_jinja_template) + b"\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.flush()


def _limit_memory() -> None:
    import resource

    usage = Path("/proc/self/statm")  # Linux only
    if not usage.exists():
        return
    limit = int(usage.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _answer(request: bytes, render: Any) -> bytes:
    try:
        texts, _ = render(**json.loads(request))
        if len(texts[0]) > MAX_CHARACTERS:
            return json.dumps({"limit": f"more than {MAX_CHARACTERS:,} characters"}).encode()
        return json.dumps({"text": texts[0]}).encode()
    except MemoryError:
        return json.dumps({"limit": f"more than {MAX_BYTES / 2**30:g} GiB of memory"}).encode()
    except Exception as error:  # a template may raise anything
        return json.dumps({"error": f"{error}"[:2000]}).encode()
