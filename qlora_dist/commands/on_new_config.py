"""Commands that write a config: a first one, or that of another trainer."""

from __future__ import annotations

import click

from .group import SET, cli
from .outputs import check_new_file


@cli.command("import")
@click.argument("file", type=click.Path())
@click.option("--out", type=click.Path(), help="The config to write, a new file. Without it, it goes to stdout.")
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(min=1), help="GPUs that FILE was used on.")
@click.option(
    "--from",
    "trainer",
    type=click.Choice(["axolotl", "llama-factory", "trl", "torchtune"]),
    help="Whose config it is, if its keys do not tell.",
)
@SET
def import_(file: str, out: str | None, gpus: int, trainer: str | None, overrides: tuple[str, ...]) -> None:
    """Translate FILE, a config of Axolotl, LLaMA-Factory, TRL or torchtune, and report what became of each key.

    Each line of the result says what it came from. What cannot be translated is listed with the reason. --set adds to
    the result, with the keys of this package.

    \b
    Example:
      qlora-dist import axolotl.yaml --gpus 8 --out run.yaml
    """
    target = None if out is None else check_new_file("--out", out)
    from .import_config import run_import

    run_import(file, target, trainer=trainer, gpus=gpus, overrides=overrides)
