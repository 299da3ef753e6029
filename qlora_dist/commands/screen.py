"""What reaches a terminal: text from data, file names, models and libraries cannot move its cursor or set its title."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from typing import Any

from ..errors import printable

# What our own output and that of progress bars consists of: colours, erase to the end of the line, one line up, return.
_ALLOWED = re.compile(r"(\x1b\[[0-9;]*[mKA]|\r)")


def guard_terminals() -> None:
    """Puts a `Screen` before stdout and stderr where these are terminals; files and pipes get every byte.

    A character that a stream cannot encode (a lone surrogate in a file name) is written as an escape on both.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if stream is not None and stream.isatty():
            setattr(sys, name, Screen(stream))


class Screen:
    """A terminal's text stream: control characters appear as escapes (\\x1b), but for colours and redrawn lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text; returns its length, as streams do."""
        parts = _ALLOWED.split(text)  # every second one is allowed
        self._stream.write("".join(part if i % 2 else printable(part) for i, part in enumerate(parts)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes all of them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PrintableFormatter(logging.Formatter):
    """A formatter whose records hold no control characters, wherever they go."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return printable(super().format(record))
