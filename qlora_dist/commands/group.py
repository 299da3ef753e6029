"""The command group, and what the commands share."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from pathlib import Path

import click

from .. import __version__
from ..cluster.launcher import launched_ranks
from ..errors import UserError, os_errors
from .screen import PrintableFormatter

SET = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a config value; may be repeated."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of user errors too, and debug logs.")
def cli(debug: bool) -> None:
    """Distributed QLoRA fine-tuning: exact over ranks, packed, resumable, measured."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler])
    # transformers imports DeepSpeed wherever it is installed, even for unrelated commands
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno > logging.WARNING)
    logging.getLogger("qlora_dist").setLevel(logging.DEBUG if debug else _log_level())


def _log_level() -> int:
    return logging.INFO if rank() == 0 else logging.WARNING  # rank 0 logs


def rank() -> int:
    """This process's rank, as set by its launcher; 0 without one, or when what it set is no rank."""
    try:
        return launched_ranks().rank
    except UserError:  # `World.init` reports it
        return 0


def output_file(path: str) -> Path:
    """A file that a command will write, checked before its work is done: its folder exists now and can be written to.

    Raises UserError or MachineFailed.
    """
    file = Path(path).expanduser()
    with os_errors(f"{file} cannot be written"):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    return file
