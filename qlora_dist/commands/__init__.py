"""The command line. Each command imports what it needs when it runs, so that `--help` and `schema` answer at once."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import traceback
from pathlib import Path

import click

from ..cluster.heartbeat import READ_SECONDS
from ..cluster.launcher import tell_launcher
from ..cluster.stop_signal import was_terminated
from ..errors import RunFailed, UserError, explain_os_error, printable
from . import on_config, on_new_config, on_result  # noqa: F401  (they register their commands)
from .group import Carried, cli, rank
from .screen import fitted, guarded, write_json

__all__ = ["cli", "invoke", "main"]

NAME = "qlora-dist"
PACKAGE = Path(__file__).parents[1]
PIPE_CODE = 141  # 128 + SIGPIPE, a shell's code for it


@cli.command()
def schema() -> None:
    """Print the JSON schema of the config, for editors.

    \b
    Example:
      qlora-dist schema > qlora_dist.schema.json
    """
    from ..config import json_schema

    write_json(json_schema(), indent=2)


@cli.command()
def doctor() -> None:
    """Report what this machine has, what is missing, and what to install.

    \b
    Example:
      qlora-dist doctor
    """
    from .doctor import doctor as examine

    raise click.exceptions.Exit(examine())


def invoke(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code: 2 and one paragraph for the user's mistakes, 1 for a failed run.

    Ranks other than 0 wait a moment before they print: what all ranks found is printed once, by rank 0, whose exit
    makes the launcher end them; what only they found they print themselves, with their rank.
    """
    with guarded() as out:
        try:
            # click catches its own Exit and returns the code
            code = cli.main(arguments, prog_name=NAME, standalone_mode=False)
            out.flush()
            return code if isinstance(code, int) else 0
        except click.ClickException as error:
            context = getattr(error, "ctx", None)  # of a usage error
            asks = f"; see {context.command_path} --help" if context is not None else ""
            _say(f"error: {error.format_message().strip().rstrip('.')}{asks}")
            return 2
        except (click.Abort, KeyboardInterrupt):
            _say("interrupted")
            return 130
        except Exception as error:
            cause = error.__cause__ if isinstance(error, Carried) and error.__cause__ is not None else error
            if isinstance(cause, BrokenPipeError) and out.is_broken:
                return PIPE_CODE  # as of any program whose output nobody reads any more, such as under `head`
            return _end(cause, "--debug" in arguments)


def _end(error: BaseException, is_debug: bool) -> int:
    """Says why the command ends, in one paragraph, and returns the exit code."""
    if is_debug:
        _say("".join(traceback.format_exception(error)).rstrip("\n"))
    text, code = _explained(error)
    tell_launcher(printable(text))
    own = rank()
    if own and not was_terminated():
        time.sleep(READ_SECONDS + 2.0)
    if own and was_terminated():
        return code  # another rank has said why
    _say(f"{f'rank {own}: ' if own else ''}{text}")
    return code


def _explained(error: BaseException) -> tuple[str, int]:
    """(paragraph, exit code)"""
    if isinstance(error, MemoryError):
        error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(error, OSError):
        error = explain_os_error("this command", error)
    if isinstance(error, UserError | RunFailed):
        return f"error: {error}", error.exit_code
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not have been imported here
        reason = str(error).split(". ")[0]
        return f"error: {reason}; end what else uses this device, take less at a time, or a larger device", 1
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return (
        f"internal error: {type(error).__name__}: {error}{where}. This is a mistake of this program, not of yours: "
        "please report it with the output of the same command with --debug (qlora-dist --debug ...)",
        1,
    )


def _say(text: str) -> None:
    """To stderr; when that is a pipe without a reader, or a full disk, there is nobody to tell."""
    with contextlib.suppress(OSError):
        print(fitted(printable(text), sys.stderr), file=sys.stderr, flush=True)


def main() -> None:
    """Entry point."""
    code = invoke(sys.argv[1:])
    # Not sys.exit. After a failure, threads of a broken process group could keep the process alive. After success under
    # a launcher everything is closed, and what libraries still tear down (groups that DeepSpeed keeps) can only fail
    # when another rank has already exited
    if code or "WORLD_SIZE" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a pipe without a reader, a full disk
                stream.flush()
        os._exit(code)
