"""The command group, and what the commands share."""

from __future__ import annotations

import contextlib
import difflib
import gc
import logging
import sys
from collections.abc import Iterator
from typing import Any, cast

import click
from click.core import ParameterSource

from .. import __version__
from ..cluster.launcher import launched_ranks
from ..cluster.quiet import quiet_libraries
from ..console import Console
from ..errors import UserError
from .screen import PlainHandler

SET = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a config value; may be repeated."
)


class Carried(Exception):
    """Its cause is an error that click would take for something else."""


class _Group(click.Group):
    """Carries errors past click, which takes any EOFError for Ctrl-D and any broken pipe for that of stdout."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (EOFError, BrokenPipeError) as error:
            raise Carried from error

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        near = difflib.get_close_matches(args[0], self.commands, n=1) if args else []
        if near and args[0] not in self.commands:
            ctx.fail(f"No such command '{args[0]}': did you mean {near[0]}?")
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of user errors too, and debug logs.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Distributed QLoRA fine-tuning: exact over ranks, packed, resumable, measured."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[PlainHandler()])
    # transformers imports DeepSpeed wherever it is installed, even for unrelated commands
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)
    logging.getLogger("qlora_dist").setLevel(logging.DEBUG if debug else _log_level())
    if not debug:
        context.with_resource(quiet_libraries())
    context.with_resource(Console(rank() == 0, sys.stderr))  # of all that has no console of its own


def debug_words() -> list[str]:
    """What precedes a command that this one starts."""
    parent = click.get_current_context().find_root()
    return ["--debug"] if parent.params.get("debug") else []


def words_without_ranks() -> list[str]:
    """The words of the command that is running, without --ranks: for the processes that it starts."""
    context = click.get_current_context()
    words = [*debug_words(), str(context.info_name)]
    for parameter in context.command.params:
        name, value = str(parameter.name), cast(Any, context.params.get(str(parameter.name)))
        if name == "ranks" or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if isinstance(parameter, click.Argument):
            words.append(value)
        elif parameter.is_flag:  # type: ignore[attr-defined]
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [f"{parameter.opts[0]}={one}" for one in (value if parameter.multiple else [value])]
    return words


def _log_level() -> int:
    return logging.INFO if rank() == 0 else logging.WARNING  # rank 0 logs


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Around a command's imports of torch and what is built on it, once in a process.

    They create a million objects that live as long as the process. Collecting garbage among them takes a tenth of a
    start, and every later collection would visit them all: they are put aside.
    """
    if not gc.isenabled() or "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def rank() -> int:
    """This process's rank, as set by its launcher; 0 without one, or when what it set is no rank."""
    try:
        return launched_ranks().rank
    except UserError:  # `World.init` reports it
        return 0
