"""Commands that write a config: a first one, or that of another trainer."""

from __future__ import annotations

import sys

import click

from ..errors import UserError
from .group import SET, cli
from .outputs import check_new_file, check_output_folder


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


@cli.command()
@click.option("--base", metavar="NAME|DIR", help="Hub name or folder of the base model.")
@click.option("--data", multiple=True, metavar="PATH", help="A file, a folder or a hub dataset; may be repeated.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), help="Default: cuda with --gpu, else auto.")
@click.option("--gpu", metavar="48GiB|NAME", help="A GPU's memory or name, by which sizes are chosen: a100-80, l4, ...")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(min=1), help="GPUs over all nodes.")
@click.option("--out", type=click.Path(), help="The config to write, a new file.  [default: run.yaml]")
@click.option("--check/--no-check", default=True, help="Show `data` and `plan` of it at once.  [default: check]")
@click.option("--recipe", metavar="NAME", help="Write a recipe, launch file or Slurm script of this package.")
@click.option("--list-recipes", is_flag=True, help="List them.")
@click.option("--demo", is_flag=True, help="Write the demo: scripts and a recipe, two minutes on two CPU cores.")
def init(
    base: str | None,
    data: tuple[str, ...],
    device: str | None,
    gpu: str | None,
    ranks: int,
    out: str | None,
    check: bool,
    recipe: str | None,
    list_recipes: bool,
    demo: bool,
) -> None:
    """Write a first config, with a comment on each line: for a base, data and hardware, or a recipe.

    On a terminal it asks for what no option gives. Sizes are the largest that fit by the memory plan.

    \b
    Example:
      qlora-dist init --base Qwen/Qwen2.5-0.5B --data data/mine.jsonl --gpu t4 --out mine.yaml
      qlora-dist init --recipe alpaca-7b
      qlora-dist init --demo
    """
    from .recipes import recipe_file, recipe_lines, write_demo, write_recipe

    if list_recipes:
        click.echo("\n".join(recipe_lines()))
        return
    if demo:
        if base is not None or data or gpu is not None or recipe is not None:
            raise UserError("--demo writes files as they are; leave --base, --data, --gpu and --recipe out")
        folder = check_output_folder("--out", out or "demo")
        commands = write_demo(folder)
        click.echo("\n  ".join([f"Written to {folder}. Next, in this folder:", *commands]))
        return
    if recipe is not None:
        if base is not None or data or gpu is not None:
            raise UserError("--recipe writes a file as it is; leave --base, --data and --gpu out, and edit the file")
        target = check_new_file("--out", out or recipe_file(recipe).name)
        click.echo(f"Written to {target}. Next: {write_recipe(recipe, target)}")
        return
    target = check_new_file("--out", out or "run.yaml")
    from .init import Wanted, draft, show_data_and_plan, write_draft

    base, data, device, gpu = _asked(base, data, device, gpu)
    drafted = draft(Wanted(base, data, device, gpu, ranks), target.stem)
    click.echo("\n".join(write_draft(drafted, target)))
    if check:
        try:
            show_data_and_plan(drafted.config, gpu, ranks)
        except UserError as error:
            raise UserError(f"{error}\n{target} is written: change it there, then qlora-dist data {target}") from None
    click.echo(f"Next: qlora-dist train {target} --ranks {'auto' if device != 'cpu' else 1}")


def _asked(
    base: str | None, data: tuple[str, ...], device: str | None, gpu: str | None
) -> tuple[str, tuple[str, ...], str, str | None]:
    """What is missing, from the user if there is a terminal. Raises UserError if not."""
    if sys.stdin.isatty() and (base is None or not data):
        base = base or click.prompt("Base model (hub name or folder)")
        data = data or tuple(click.prompt("Data (file, folder or hub dataset)").split())
        if device is None and gpu is None:
            answer = click.prompt("GPU (a name such as l4, memory such as 24GiB, none, or cpu)", default="none")
            device, gpu = ("cpu", None) if answer == "cpu" else (None, None if answer == "none" else answer)
    if base is None or not data:
        missing = [name for name, given in (("--base NAME", base), ("--data PATH", data)) if not given]
        raise UserError(
            f"init: expected {' and '.join(missing)}, as there is no terminal to ask on; or --recipe NAME, see "
            "--list-recipes"
        )
    if gpu is not None and device == "cpu":
        raise UserError(f"--gpu {gpu} and --device cpu: give one of the two")
    return base, data, device or ("auto" if gpu is None else "cuda"), gpu
