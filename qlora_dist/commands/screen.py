"""What reaches the terminal. Text from data, names, configs and errors may hold control characters, which a terminal
obeys: they would move its cursor, hide lines, or write to the clipboard. Here they become visible text, for all output.

guarded         puts Screens around stdout and stderr while a command runs: the one mechanism
styled          stdout for rich, whose texts have passed `printable` before they are styled
write_data      what a program may read: exact in a file or pipe; write_json: in which no control characters are left
fitted          text in the width of a terminal, broken between words
PlainFormatter  log records; PlainHandler puts them on stderr
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from ..errors import printable, printable_json, wrapped

# stdout has one progress line of our own, which begins with a carriage return; colours only where `styled` is asked for
_OUT = re.compile(r"(\A\r)")
# progress bars, and libraries that colour their warnings: colours, erasing a line, going up a line; never a title, a
# hyperlink, the clipboard, another screen
_STYLED = re.compile(r"(\r|\x1b\[[0-9;]*[mKA])")


class Screen:
    """A text stream that escapes what a terminal would obey, except what `passes` finds. Otherwise the stream itself.

    Not only on a terminal: a log file is shown on one later.
    """

    def __init__(self, stream: TextIO, passes: re.Pattern[str]) -> None:
        self.stream = stream
        self.is_broken = False  # its reader has ended
        self._passes = passes

    def write(self, text: str) -> int:
        """As of a text stream. A character that the stream's encoding lacks is escaped, too: no UnicodeEncodeError."""
        parts = self._passes.split(text)  # at odd places what passes
        self.write_exact("".join(part if i % 2 else printable(part) for i, part in enumerate(parts)))
        return len(text)

    def write_exact(self, text: str) -> None:
        """Writes control characters, too."""
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                self.stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except BrokenPipeError:
            self.is_broken = True
            raise

    def writelines(self, lines: list[str]) -> None:
        """As of a text stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As of a text stream."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.is_broken = True
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def guarded() -> Iterator[Screen]:
    """Everything that this process writes to stdout and stderr passes a Screen; gives that of stdout."""
    before = sys.stdout, sys.stderr
    # closed by the shell (>&-): print to nowhere
    out, err = (open(os.devnull, "w") if stream is None else stream for stream in before)  # noqa: SIM115
    screen = Screen(out, _OUT)
    sys.stdout, sys.stderr = cast(TextIO, screen), cast(TextIO, Screen(err, _STYLED))
    try:
        yield screen
    finally:
        sys.stdout, sys.stderr = before


def styled() -> TextIO:
    """stdout for text with colours. Text from outside must have passed `printable` before it was coloured."""
    stream = sys.stdout
    return cast(TextIO, Screen(stream.stream if isinstance(stream, Screen) else stream, _STYLED))


def write_data(text: str) -> None:
    """Writes to stdout what a file or program gets exactly, and a terminal with control characters escaped."""
    stream: Any = sys.stdout
    if stream.isatty():
        stream.write(printable(text))
    else:
        getattr(stream, "write_exact", stream.write)(text)
    stream.flush()


def write_json(value: Any, **options: Any) -> None:
    """A line of JSON, or several with `indent`. `options`: of json.dumps."""
    write_data(printable_json(json.dumps(value, **options)) + "\n")


def fitted(text: str, stream: TextIO) -> str:
    """A text for people, in lines that a terminal need not break within a word; as it is for a file or pipe."""
    return wrapped(text, max(20, shutil.get_terminal_size().columns), 2) if stream.isatty() else text


class PlainFormatter(logging.Formatter):
    """A record as text without control characters; that of a traceback, too."""

    def format(self, record: logging.LogRecord) -> str:
        """As of logging.Formatter."""
        return printable(super().format(record))


class PlainHandler(logging.StreamHandler):
    """Writes records to stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(PlainFormatter("%(name)s: %(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        """As of logging.Handler, in the width of the terminal."""
        return fitted(super().format(record), self.stream)
