"""What is said to a person, in a run by rank 0: lines, one line of progress, and the same in the run's train.log.

On a terminal the progress line is drawn in place and lines are wrapped between words. Elsewhere there are plain lines,
and progress is one of them after PLAIN_SECONDS without any.
"""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .errors import printable, wrapped
from .progress import format_seconds, shown_by

PLAIN_SECONDS = 10.0  # between progress lines when the output is not a terminal; the longest silence of `watched`
DRAW_SECONDS = 0.1  # between two states of the progress line on a terminal
LOOK_SECONDS = 1.0  # between looks of `watched`
LABEL = 9  # columns of the label of a header line
SMALLEST_BAR, LARGEST_BAR = 6, 30
ECHO = "^C"  # what a terminal adds to the line at Ctrl-C


class Console:
    """Context manager. Says nothing until `is_main` is set: rank 0 speaks."""

    def __init__(
        self, is_main: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.is_main = is_main
        self._stream = stream if stream is not None else sys.stdout
        self.now = clock  # seconds
        self._is_terminal = self._stream.isatty()
        self._drawn = 0  # columns of the progress line that is on the screen
        self.last_said = self._last_logged = clock()
        self._last_drawn = -1e9
        self._unlogged: list[str] = []  # until there is a log
        self._log: TextIO | None = None
        self._lock = threading.RLock()  # `watched` speaks from a thread
        self._undo = ExitStack()
        self._process = os.getpid()

    def __enter__(self) -> Console:
        for handler in logging.getLogger().handlers:
            handler.addFilter(self._make_way)
            self._undo.callback(handler.removeFilter, self._make_way)
        self._undo.enter_context(shown_by(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        with self._lock:
            self._clear()
            if self._log is not None:
                with suppress(OSError):
                    self._log.close()
                self._log = None

    # --- lines --------------------------------------------------------------------------------------------------------

    def print(self, text: str, label: str = "") -> None:
        """Lines for the user, after those before. With a `label`, texts begin in the same column."""
        if not self.is_main:
            return
        with self._lock:
            self._clear()
            lines = [f"{label:<{LABEL}}{text}"] if label else text.splitlines()
            if self._is_terminal:
                indent = LABEL if label else 2
                lines = [wrapped(line, self._width(), indent) for line in lines]
            print("\n".join(lines), file=self._stream, flush=True)
            self.last_said = self.now()
            self._to_log(f"{label:<{LABEL}}{text}" if label else text)

    @property
    def unlogged(self) -> str:
        """What was said in this start before `keep_log`."""
        return "\n".join(self._unlogged)

    def keep_log(self, path: Path) -> None:
        """From here on what is said goes to this file as well, after what was said before in this start."""
        if not self.is_main or self._log is not None:
            return
        with self._lock, self._log_errors():
            self._log = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by __exit__
            unlogged, self._unlogged = self._unlogged, []
            self._to_log("\n".join([f"--- {utc_now()} ---", *unlogged]))

    def log(self, text: str) -> None:
        """To train.log alone: what reaches the terminal in another way."""
        with self._lock:
            self._to_log(text)

    def _make_way(self, record: logging.LogRecord) -> bool:
        """Before a handler writes a record to the terminal: it shall not stand behind the progress."""
        if os.getpid() != self._process:  # forked, perhaps while a thread held the lock: nobody there would release it
            return True
        with self._lock:
            self._clear()
            self.last_said = self.now()
        return True

    def _to_log(self, text: str) -> None:
        self._last_logged = self.now()
        if self._log is None:
            self._unlogged.append(text)
            return
        with self._log_errors():
            self._log.write(printable(text) + "\n")
            self._log.flush()

    @contextmanager
    def _log_errors(self) -> Iterator[None]:
        """A run does not end for its log: what matters is in metrics.jsonl, whose errors end it."""
        try:
            yield
        except OSError as error:
            self._log = None
            print(f"train.log cannot be written ({error.strerror}): the run goes on without it", file=self._stream)

    # --- progress -----------------------------------------------------------------------------------------------------

    def progress(
        self,
        what: str,
        done: int,
        total: int | None,
        fields: Sequence[str],
        more: Sequence[str] = (),
        is_edge: bool = False,
        amount: str | None = None,
    ) -> None:
        """One state of some work; `total` None: not known. `more` are fields that a narrow terminal does without;
        `is_edge`: the first or last state, which is said in any case; `amount`: how much is done, instead of a count.
        """
        if not self.is_main:
            return
        if amount is None:
            amount = f"{done:,}" if total is None else f"{done:,}/{total:,}"
        with self._lock:
            now, head = self.now(), f"{what} {amount}"
            plain = "  ".join([head, *fields, *more])
            if is_edge or now - self._last_logged >= PLAIN_SECONDS:
                self._to_log(plain)
            if self._is_terminal:
                if is_edge or now - self._last_drawn >= DRAW_SECONDS:
                    self._draw(head, done, total, fields, more)
                    self._last_drawn = self.last_said = now
                if is_edge and done == total:  # it stays
                    print(file=self._stream, flush=True)
                    self._drawn = 0
            elif is_edge or now - self.last_said >= PLAIN_SECONDS:
                print(plain, file=self._stream, flush=True)
                self.last_said = now

    def end_progress(self) -> None:
        """The work that was shown has ended."""
        with self._lock:
            self._clear()

    def _draw(self, head: str, done: int, total: int | None, fields: Sequence[str], more: Sequence[str]) -> None:
        width = self._width() - 1 - len(ECHO)
        parts = [head]
        room = SMALLEST_BAR + 2
        for field in (*fields, *more):  # the first that does not fit ends the line: no field is cut
            if len("  ".join([*parts, field])) + (room if field in more else 0) > width:
                break
            parts.append(field)
        room = min(width - len("  ".join(parts)) - 2, LARGEST_BAR)
        if total is not None and room >= SMALLEST_BAR:
            parts.insert(1, self._bar(done, total, room))
        text = "  ".join(parts)[:width]
        print("\r" + text.ljust(max(self._drawn, len(text))), end="", file=self._stream, flush=True)
        self._drawn = len(text)

    def _bar(self, done: int, total: int, width: int) -> str:
        from rich.console import Console as RichConsole
        from rich.progress_bar import ProgressBar

        console = RichConsole(file=self._stream, color_system=None, width=width)
        with console.capture() as captured:
            console.print(ProgressBar(total=max(total, 1), completed=done, width=width), end="")
        return captured.get().ljust(width)

    def _clear(self) -> None:
        """Takes the progress line off the screen, with the echo that a terminal has added to it."""
        if self._drawn:
            print("\r" + " " * (self._drawn + len(ECHO)), end="", file=self._stream)
            print("\r", end="", file=self._stream, flush=True)
            self._drawn = 0

    def _width(self) -> int:
        return max(20, shutil.get_terminal_size().columns)

    # --- silence ------------------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self, status: Callable[[], str]) -> Iterator[None]:
        """Inside, what takes long says so: after PLAIN_SECONDS without a line, what `status` says is being done."""
        ended, silence = threading.Event(), Silence(self, status)

        def watch() -> None:
            with suppress(OSError):  # a pipe without a reader ends the main thread, too
                while not ended.wait(LOOK_SECONDS):
                    silence.look()

        thread = threading.Thread(target=watch, name="console", daemon=True)
        if self.is_main:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if self.is_main:
                thread.join()


class Silence:
    """Breaks the silence of a console; `look` is called every second or so."""

    def __init__(self, console: Console, status: Callable[[], str]) -> None:
        self._console = console
        self._status = status
        self._doing, self._since = "", 0.0

    def look(self) -> None:
        """Says what is being done, and for how long, if nothing was said for PLAIN_SECONDS."""
        doing, now = self._status(), self._console.now()
        if doing != self._doing:
            self._doing, self._since = doing, now
        if now - self._console.last_said >= PLAIN_SECONDS:
            self._console.print(f"... {doing}: {format_seconds(now - self._since)}")


def utc_now() -> str:
    """The date and time in UTC, as ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def about(seconds: float) -> str:
    """A rough time: under a second, 40 s, 3 minutes, 1.5 hours."""
    if seconds < 1:
        return "under a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def count(number: int, what: str) -> str:
    """1 row, 2 rows."""
    return f"{number:,} {what}{'s' * (number != 1)}"
