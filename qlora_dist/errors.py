"""How a command ends early, and errors as plain data for other ranks. Level 0: imports nothing from this package."""

from __future__ import annotations

import errno
import os
import re
import reprlib
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """A mistake in what the user supplied (config, data, paths). Printed as one paragraph; exit code 2.

    The text states what was found, what was expected, and what to do.
    """

    exit_code = 2


class RunFailed(RuntimeError):
    """The run itself failed (non-finite loss, a failed check). Exit code 1.

    The text names the step and the cause, and what is still intact on disk.
    """

    exit_code = 1


class MachineFailed(RunFailed):
    """The machine failed (disk, memory, device, network): the same command may succeed later. Exit code 1."""


# --- errors of the operating system -----------------------------------------------------------------------------------

# Another attempt fails in the same way until the user changes something
_LASTING = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EINVAL, errno.ENXIO,
}  # fmt: skip
_ADVICE = {
    errno.ENOSPC: "free space on that disk, or inodes (df -i), and start the same command again",
    errno.EDQUOT: "your quota on that disk is used up: remove files, or ask for more",
    errno.EIO: "the disk or network file system failed (dmesg may say more); start again on a good one",
    errno.ESTALE: "a network file system lost the file; start the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "host memory is used up: free it, and start the same command again",
    errno.ENOENT: "was it removed while the command was running?",
    errno.EACCES: "fix its permissions, or choose another place",
    errno.EPERM: "fix its permissions, or choose another place",
    errno.EROFS: "this file system is read-only: choose another place",
    errno.ENOTDIR: "a file stands where a folder is expected: move it away",
    errno.EISDIR: "a folder stands where a file is expected: move it away",
    errno.EEXIST: "something else stands in its place: move it away, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "symbolic links lead in a circle, or a link stands where none is followed: choose another place",
    errno.EINVAL: "the file system does not take this name or this operation: choose another place",
    errno.ENXIO: "a pipe or a device stands where a file is expected: move it away",
}


def explain_os_error(doing: str, error: OSError, kept: str = "") -> UserError | MachineFailed:
    """The error that ends a command after `error` while `doing` something; `kept`: a sentence on what is intact."""
    path = f" ({os.fspath(error.filename)!s})" if isinstance(error.filename, str | os.PathLike) else ""
    advice = _ADVICE.get(error.errno or 0, "start the same command again; if it fails again, look at the disk")
    text = f"{doing}: {error.strerror or error}{path}; {advice}" + (f". {kept}" if kept else "")
    return UserError(text) if error.errno in _LASTING else MachineFailed(text)


@contextmanager
def os_errors(doing: str, kept: str = "") -> Iterator[None]:
    """Ends the command with one clear paragraph when the block meets an error of the operating system, or no memory."""
    try:
        yield
    except MemoryError as error:
        raise explain_os_error(doing, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), kept) from error
    except OSError as error:
        raise explain_os_error(doing, error, kept) from error


# --- errors of other ranks --------------------------------------------------------------------------------------------

_KINDS: dict[str, type[UserError] | type[RunFailed]] = {"user": UserError, "machine": MachineFailed, "run": RunFailed}


def pack_error(error: BaseException) -> tuple[str, str]:
    """(kind, text) as plain data, from which another rank raises the same error, see `unpack_error`."""
    if isinstance(error, UserError):
        return "user", str(error)
    is_machine = isinstance(error, MachineFailed | OSError | MemoryError)
    return "machine" if is_machine else "run", str(error) or repr(error)


def unpack_error(kind: str, text: str) -> UserError | RunFailed:
    """The error that `pack_error` packed; anything but UserError and MachineFailed becomes a RunFailed."""
    return _KINDS.get(kind, RunFailed)(text)


# --- text from outside in messages ------------------------------------------------------------------------------------

# C0 and C1 controls except tab and newline, directional overrides, line separators, lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlevel = 3


def printable(text: str) -> str:
    """Text from data, file names or configs, safe for a terminal: control characters appear as escapes (\\x1b)."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def wrapped(text: str, width: int, indent: int = 0) -> str:
    """Each line of a text in lines of at most `width` columns, broken between words only; further ones are indented."""
    return "\n".join(
        "\n".join(
            textwrap.wrap(
                line,
                width,
                subsequent_indent=" " * indent,
                expand_tabs=False,
                replace_whitespace=False,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
        for line in text.splitlines()
    )


def printable_json(text: str) -> str:
    """JSON text of the same value, safe for a terminal."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shortened(value: Any) -> str:
    """`repr` of a value from outside, at most 200 characters, in bounded time."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = f"a {type(value).__name__} with too many digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
