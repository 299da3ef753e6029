"""One line of the report; unforeseen errors become one, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`found`: what there is; `advice`: what to install or do."""

    status: Literal["ok", "warn", "missing"]
    subject: str
    found: str
    advice: str = ""
    blocks: bool = False  # no device can train until this is fixed
    can_train: bool = False  # a device on which training works

    def __str__(self) -> str:
        line = f"{self.status:<8} {self.subject:<22} {self.found}"
        return f"{line}; {self.advice}" if self.advice else line


def guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that fails unexpectedly becomes a finding; the later checks still run."""
    try:
        yield from check()
    except Exception as error:
        subject = check.__name__.removeprefix("check_").replace("_", " ")
        yield Finding("warn", subject, f"could not be checked ({reason(error)})")


def reason(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
