"""Commands that take a trained run or adapter, or a model."""

from __future__ import annotations

import click

from ..errors import UserError
from ..files import format_bytes
from .group import cli, heavy_imports, rank, words_without_ranks
from .outputs import check_input_file, check_output_folder
from .screen import write_json


@cli.command()
@click.argument("run_or_adapter", type=click.Path())
@click.option("--config", type=click.Path(), help="Use the data section of this config instead of the run's.")
@click.option("--base", help="The base model, if it has moved.")
@click.option("--micro-rows", default=1, show_default=True, help="Rows processed at a time.")
@click.option("--with-base", is_flag=True, help="Also evaluate the base without the adapter.")
@click.option("--tasks", default="perplexity", show_default=True, help="perplexity, mmlu or perplexity,mmlu.")
@click.option(
    "--mmlu", type=click.Path(), metavar="DIR", help="MMLU's original release: a folder with dev/, val/ and test/."
)
@click.option("--mmlu-split", default="test", show_default=True)
@click.option("--mmlu-shots", default=5, show_default=True, help="Solved examples before each question.")
@click.option("--mmlu-tokens", default=2048, show_default=True, help="Longest prompt; longer ones get fewer examples.")
@click.option(
    "--ranks", metavar="N|auto", help="Start N processes here, over which the base of an fsdp run is sharded."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    run_or_adapter: str,
    config: str | None,
    base: str | None,
    micro_rows: int,
    with_base: bool,
    tasks: str,
    mmlu: str | None,
    mmlu_split: str,
    mmlu_shots: int,
    mmlu_tokens: int,
    ranks: str | None,
    as_json: bool,
) -> None:
    """Evaluate a run or adapter: held-out loss and perplexity by the loss code of training, and MMLU.

    \b
    Example:
      qlora-dist evaluate runs/alpaca-7b --with-base --tasks perplexity,mmlu --mmlu data/mmlu
      qlora-dist evaluate runs/llama2-70b-fsdp --ranks 2
    """
    from dataclasses import asdict

    from .preflight import check_result

    wanted = {task.strip() for task in tasks.split(",")}
    if wanted - {"perplexity", "mmlu"}:
        raise UserError(f"--tasks {tasks}: expected perplexity, mmlu, or perplexity,mmlu")
    if ("mmlu" in wanted) != (mmlu is not None):
        raise UserError("--tasks mmlu and --mmlu DIR (the folder of MMLU's original release) go together")
    check_result(run_or_adapter, config, is_evaluated="perplexity" in wanted)
    _start(ranks)
    with heavy_imports():
        from .evaluate import MmluTask, describe, evaluate_trained

    results = evaluate_trained(
        run_or_adapter,
        config=config,
        base=base,
        micro_rows=micro_rows,
        with_base=with_base,
        perplexity="perplexity" in wanted,
        mmlu=MmluTask(mmlu, mmlu_split, mmlu_shots, mmlu_tokens) if mmlu is not None else None,
    )
    if rank():
        return
    if as_json:
        write_json({name: asdict(result) for name, result in results.items()})
        return
    for name, result in results.items():
        for line in describe(result):
            click.echo(f"{name}: {line}")


@cli.command()
@click.argument("run_or_adapter", type=click.Path())
@click.option("--prompt", help="One prompt; the answer is streamed.")
@click.option("--prompts", type=click.Path(), help="A file: one prompt per line, or jsonl with `prompt` or `messages`.")
@click.option("--base", help="The base model, if it has moved.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR", help="Another adapter; the last is active.")
@click.option(
    "--weight", "weights", multiple=True, metavar="NAME=W", help="Combine adapters; the run's own is named `trained`."
)
@click.option("--combination", default="cat", show_default=True, help="PEFT's way to combine: cat, linear, svd, ...")
@click.option("--template", default="auto", show_default=True, help="auto: as in training; raw: none; or a name.")
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=8, show_default=True, help="Prompts of a file that are answered in one batch.")
@click.option(
    "--ranks", metavar="N|auto", help="Start N processes here, over which the base of an fsdp run is sharded."
)
def generate(
    run_or_adapter: str,
    prompt: str | None,
    prompts: str | None,
    base: str | None,
    adapters: tuple[str, ...],
    weights: tuple[str, ...],
    combination: str,
    template: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
    ranks: str | None,
) -> None:
    """Answer one prompt or a file of prompts; without either option, chat on the terminal.

    \b
    Example:
      qlora-dist generate runs/guanaco-7b --prompt "Name three rivers in Spain."
      qlora-dist generate runs/llama2-70b-fsdp --prompts prompts.jsonl --ranks 2
    """
    from .preflight import check_result

    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts were both given; give one of them, or neither for a chat")
    if prompts is not None:
        check_input_file("--prompts", prompts)
    check_result(run_or_adapter)
    _start(ranks)
    with heavy_imports():
        from ..model import Sampling
        from .generate import generate as run_generation

    run_generation(
        run_or_adapter,
        prompt=prompt,
        prompts=prompts,
        base=base,
        adapters=adapters,
        weights=weights,
        how=combination,
        template=template,
        sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed),
        batch_size=batch_size,
    )


def _start(ranks: str | None) -> None:
    """Replaces this process by the ranks that were asked for; nothing for one."""
    from .start_ranks import number_of_ranks, start_ranks

    if ranks is not None and (number := number_of_ranks(ranks, "auto")) > 1:
        start_ranks(number, words_without_ranks())


@cli.command()
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--onto",
    type=click.Choice(["auto", "base", "dequantized"]),
    default="auto",
    show_default=True,
    help="The original weights, or those that a quantized base computed with in training. auto: the nearer to what was "
    "trained, which for models over 2B is the latter, without measuring both.",
)
@click.option("--base", help="The base model, if it has moved.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--compare/--no-compare", default=None, help="Measure the other target, too (default: up to 2B).")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of a wrapper the files stay the base's.")
@click.option(
    "--text-only", is_flag=True, help="Of a base with towers for images or sound, write the text model alone."
)
def merge(
    adapter: str,
    out: str,
    onto: str,
    base: str | None,
    dtype: str,
    compare: bool | None,
    max_shard_size: str,
    text_only: bool,
) -> None:
    """Merge ADAPTER (a run or an adapter folder) into its base and write the 16-bit model to the new folder OUT.

    An adapter is trained to correct the base that it saw. Onto the dequantized base the merged model equals the trained
    one, up to rounding; onto the original weights it is another model, better or worse. By how much their logits
    differ is measured and printed.

    \b
    Example:
      qlora-dist merge runs/alpaca-7b merged/alpaca-7b
    """
    from .preflight import check_result

    check_output_folder("OUT", out)
    check_result(adapter)
    with heavy_imports():
        import torch

        from .merge import describe
        from .merge import merge as run_merge

    report = run_merge(
        adapter,
        out,
        onto=onto,  # type: ignore[arg-type]
        base=base,
        dtype=getattr(torch, dtype),
        compare=compare,
        max_shard_size=max_shard_size,
        text_only=text_only,
    )
    click.echo(describe(report))


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN...]", type=click.Path())
@click.option(
    "--out", type=click.Path(), metavar="FILE", help="The page to write (default: report.html in the one RUN)."
)
def report(runs: tuple[str, ...], out: str | None) -> None:
    """Draw the page of a run again from its files, or lay several runs over each other in one page.

    A page is one HTML file that needs no network. While a run trains it draws its own; this needs no torch and no GPU.

    \b
    Example:
      qlora-dist report runs/alpaca-7b
      qlora-dist report runs/alpaca-7b runs/alpaca-7b-r16 --out compared.html
    """
    from .report import report as run_report

    click.echo(run_report(runs, out))


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option("--quantization", type=click.Choice(["nf4", "fp4"]), default="nf4", show_default=True)
@click.option(
    "--double-quant/--no-double-quant",
    default=True,
    show_default=True,
    help="Quantize the constants, too.",
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--revision", help="Hub branch, tag or commit.")
def quantize(model: str, out: str, quantization: str, double_quant: bool, dtype: str, revision: str | None) -> None:
    """Write the 4-bit form of the 16-bit MODEL to the new folder OUT, weight by weight.

    Memory is bounded by the tensors of one file, not by the model. transformers loads OUT as it is.

    \b
    Example:
      qlora-dist quantize meta-llama/Llama-2-7b-hf models/llama-2-7b-nf4
    """
    check_output_folder("OUT", out)
    with heavy_imports():
        import torch

        from ..cluster.world import own_device
        from ..model import quantize_model

    size = quantize_model(
        model,
        out,
        revision=revision,
        quantization=quantization,  # type: ignore[arg-type]
        double_quant=double_quant,
        compute_dtype=getattr(torch, dtype),
        device=own_device(),
    )
    click.echo(f"{out}: {format_bytes(size)} of {quantization}, double_quant={double_quant}")
