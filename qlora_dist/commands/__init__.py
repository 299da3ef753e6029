"""The command line. Each command imports what it needs when it runs, so that `--help` and `schema` answer at once."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import traceback
from pathlib import Path

import click

from ..cluster.heartbeat import READ_SECONDS
from ..cluster.stop_signal import was_terminated
from ..errors import RunFailed, UserError, explain_os_error, printable
from . import on_config, on_result  # noqa: F401  (they register their commands)
from .group import cli, rank
from .screen import guard_terminals

__all__ = ["cli", "invoke", "main"]


@cli.command()
def schema() -> None:
    """Print the JSON schema of the config, for editors.

    \b
    Example:
      qlora-dist schema > qlora_dist.schema.json
    """
    from ..config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


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

    An error that nothing in the package expects is a paragraph too, which says where it arose and asks for a report.
    Ranks other than 0 wait a moment before they print: what all ranks found is printed once, by rank 0, whose exit
    makes the launcher end them; what only they found they print themselves, with their rank.
    """
    try:
        # click catches its own Exit and returns the code
        code = cli.main(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return 2
    except click.Abort:
        click.echo("interrupted", err=True)
        return 130
    except Exception as error:
        if "--debug" in arguments:
            click.echo(printable(traceback.format_exc()), err=True)
        ended = _expected(error)
        own = rank()
        if own and not was_terminated():
            time.sleep(READ_SECONDS + 2.0)
        if own and was_terminated():
            return ended.exit_code  # another rank has said why
        click.echo(printable(f"{f'rank {own}: ' if own else ''}error: {ended}"), err=True)
        return ended.exit_code


def _expected(error: Exception) -> UserError | RunFailed:
    """The error that a command ends with."""
    if isinstance(error, UserError | RunFailed):
        return error
    if isinstance(error, MemoryError):
        error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(error, OSError):
        return explain_os_error("this command", error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(__file__).parents[1] in Path(frame.filename).parents]
    place = (own or frames)[-1]
    return RunFailed(
        f"internal error: {type(error).__name__}: {str(error)[:500]} ({place.filename}, line {place.lineno}). This "
        "is a fault of qlora-dist, not of yours; please report it with the output of `qlora-dist --debug ...`, the "
        "same command once more"
    )


def main() -> None:
    """Entry point."""
    guard_terminals()
    code = invoke(sys.argv[1:])
    # Not sys.exit. After a failure, threads of a broken process group could keep the process alive. After success under
    # a launcher everything is closed, and what libraries still tear down (groups that DeepSpeed keeps) can only fail
    # when another rank has already exited
    if code or "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
