"""Commands that take a config: before and during a run."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..cluster.launcher import launched_ranks
from .group import SET, cli, debug_words, heavy_imports, rank
from .outputs import check_output_file
from .screen import write_json

if TYPE_CHECKING:
    from ..train import TrainState


@cli.command()
@click.argument("config", type=click.Path())
@SET
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|DIR",
    help="auto: resume from the newest checkpoint of the run directory that verifies. DIR: from this one.",
)
@click.option("--ranks", metavar="N|auto", help="Start N processes on this machine. auto: one for each GPU.")
@click.option("--fresh", is_flag=True, help="Start over: a run in the run directory is renamed, with the date.")
@click.option("--outcome", type=click.Path(), hidden=True, help="File for the outcome of the run, for `supervise`.")
def train(
    config: str, overrides: tuple[str, ...], resume: str, ranks: str | None, fresh: bool, outcome: str | None
) -> None:
    """Train as configured in CONFIG: in this process, in --ranks processes, or as one that a launcher has started.

    \b
    Example:
      qlora-dist train launch/recipes/alpaca-7b.yaml --ranks auto
      accelerate launch --config_file launch/accelerate/ddp.yaml -m qlora_dist train launch/recipes/alpaca-7b.yaml
    """
    from ..config import load_config

    loaded = load_config(config, overrides)
    from .preflight import check_train
    from .start_ranks import number_of_ranks, start_ranks

    if ranks is not None and (number := number_of_ranks(ranks, loaded.device)) > 1:
        finished = check_train(loaded, resume, fresh, is_main=True, ranks=number)
        if finished is not None and not outcome:
            click.echo(finished)  # the ranks would say so once they have imported torch
            return
        words = ["train", config, *(f"--set={one}" for one in overrides), f"--resume={resume}"]
        words += ["--fresh"] * fresh + ([f"--outcome={outcome}"] if outcome else [])
        start_ranks(number, [*debug_words(), *words])
    from .supervise.exit_report import report_outcome

    def run() -> TrainState:
        check_train(loaded, resume, fresh, rank() == 0, launched_ranks().size)
        with heavy_imports():
            from ..train import train as run_training

        return run_training(loaded, resume, fresh)

    report_outcome(Path(outcome) if outcome else None, rank() == 0, run)


@cli.command(hidden=True)
@click.option("--job", required=True, help="Slurm's job id.")
@click.option("--restarts", default=0, help="How often Slurm has restarted the job.")
@SET
@click.option("--resume", default="auto", help="As for train, of the first start; later ones go on.")
@click.argument("config", type=click.Path())
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def supervise(
    job: str, restarts: int, overrides: tuple[str, ...], resume: str, config: str, command: tuple[str, ...]
) -> None:
    """The batch process of slurm/train.sbatch: runs COMMAND until the run that CONFIG names is finished.

    \b
    Example:
      qlora-dist supervise --job 17 run.yaml -- srun torchrun --rdzv-id={id} ... -m qlora_dist train run.yaml
    """
    from ..cluster.stop_signal import StopSignal

    with StopSignal() as stop:
        from ..config import load_config
        from .supervise import Job
        from .supervise import supervise as run_supervisor

        code = run_supervisor(Job(job, restarts), Path(load_config(config, overrides).run_dir), command, stop, resume)
    raise click.exceptions.Exit(code)


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("first_node", metavar="FIRST_NODE:PORT")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="TORCHRUN_OPTIONS...")
def torchrun(first_node: str, options: tuple[str, ...]) -> None:
    """Start torchrun on this node of several: the same command on every node, whatever their names resolve to.

    FIRST_NODE is an address of the first node that all others reach, or a name that resolves to one on them.

    \b
    Example:
      qlora-dist torchrun 10.0.0.1:29500 --nnodes 4 --nproc-per-node 8 -m qlora_dist train launch/recipes/alpaca-7b.yaml
    """
    from .torchrun import run_torchrun

    run_torchrun(first_node, options)


@cli.command()
@click.argument("config", type=click.Path())
@SET
@click.option("--gpu", metavar="48GiB|NAME", help="A GPU's memory or name: a100-80, h100, rtx4090, a6000, ...")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(min=1), help="GPUs over all nodes.")
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(min=1), help="Over which they are spread.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--simulate",
    is_flag=True,
    help="Also run a step of the real code under fake tensors, without a GPU: its memory and, with --gpu, its time.",
)
def plan(
    config: str, overrides: tuple[str, ...], gpu: str | None, ranks: int, nodes: int, as_json: bool, simulate: bool
) -> None:
    """Show what a run needs and whether it fits, from CONFIG and the model's config.json alone, in about a second.

    \b
    Example:
      qlora-dist plan launch/recipes/alpaca-7b.yaml --gpu rtx4090
    """
    from ..config import load_config
    from .plan import run_plan_command

    run_plan_command(
        load_config(config, overrides), gpu=gpu, ranks=ranks, nodes=nodes, as_json=as_json, simulate=simulate
    )


@cli.command()
@click.argument("config", type=click.Path())
@SET
@click.option("--show", default=3, show_default=True, help="Samples to print, with learned tokens marked.")
@click.option("--html", type=click.Path(), help="Write the same as a self-contained HTML page.")
def data(config: str, overrides: tuple[str, ...], show: int, html: str | None) -> None:
    """Inspect the training data before a run: sources, lengths, packing, masks, warnings. Needs no model weights.

    \b
    Example:
      qlora-dist data launch/recipes/alpaca-7b.yaml --show 5 --html data.html
    """
    if html is not None:
        html = str(check_output_file("--html", html))
    from ..config import load_config

    loaded = load_config(config, overrides)
    from .preflight import check_data

    check_data(loaded)
    from ..data.tokenizer import load_tokenizer
    from .data_report import run_data_command

    run_data_command(loaded, load_tokenizer(loaded.model.name, loaded.model.revision), show, html)


@cli.command()
@click.argument("config", type=click.Path())
@SET
@click.option("--steps", default=4, show_default=True, help="Optimizer updates of each run.")
@click.option("--ranks", default=2, show_default=True, help="Processes to compare with one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(config: str, overrides: tuple[str, ...], steps: int, ranks: int, as_json: bool) -> None:
    """Verify on your own model, data and strategy that the mathematics holds, in a few steps and a temporary folder.

    Packed = alone, accumulation = one batch, N ranks = 1 rank, strategy = ddp, resumed = uninterrupted, saved = loaded
    in stock PEFT, loss = transformers' own. Exit code 1 when a claim fails.

    \b
    Example:
      qlora-dist verify launch/recipes/demo.yaml --ranks 2
    """
    from ..config import load_config

    loaded = load_config(config, overrides)
    from .preflight import check_base, check_data

    check_data(loaded)
    check_base(loaded)
    with contextlib.redirect_stdout(sys.stderr):  # deepspeed greets on stdout when it is imported
        with heavy_imports():
            from .verify import prove

        report = prove(loaded, steps=steps, ranks=ranks)
    if as_json:
        write_json(report.as_json(), indent=2)
    else:
        click.echo(f"{report.table()}\n{report.sentence()}")
    if report.failures:
        raise click.exceptions.Exit(1)
