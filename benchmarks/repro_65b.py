"""LLaMA-65B on one 48 GB card: the paper's recipe, with the real weights or with random ones.

    python -m benchmarks.repro_65b --random-weights --out benchmarks/results/h100/repro_65b.json
    python -m benchmarks.repro_65b --sparse-weights /dev/shm/65b --out ...   # on the null device: files are read too
    python -m benchmarks.repro_65b            # the reproduction itself: real weights, 1,875 steps

With `--random-weights` memory and speed are measured without the 130 GB checkpoint and without a network: the model is
created tensor by tensor from its shapes and quantized immediately, and the data are random tokens that fill every row,
the most work that a row can be. With `--sparse-weights` the 130 GB are read from files, of zeros that take no disk
space, on a device that computes nothing. Training, memory and checkpoints are those of
`qlora-dist train launch/recipes/repro_65b_48gb.yaml`.

The card is limited to `--cap-gib` (47.54 GiB, as reported by an RTX A6000): PyTorch may not allocate more, including
the CUDA context. Paged optimizer states are outside PyTorch's allocator and stay on a larger card while it has space;
with `--crowd` another process occupies the rest of the card, so that they have no more space than on the small card.
Use it only on a card that is not shared: managed memory beyond what is free can hang the GPU. So `--crowd` is refused
if the plan, states included, exceeds the cap, and PyTorch gets only what the states leave: a run that needs more fails
with an out-of-memory error and pages nothing. `--set` changes the recipe, for example to rows of 2,048 tokens (see the
recipe's header); `--layers` and `--hidden` make the model smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_dist.config import RunConfig, load_config
from qlora_dist.errors import UserError
from qlora_dist.memory import choose
from qlora_dist.memory.read_shapes import read_shapes
from qlora_dist.train import train

from . import memory, provenance
from .sparse import WEIGHTS, write_sparse_weights

GIB = 2**30
RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "repro_65b_48gb.yaml"
MEASURED_STEPS = 5  # with random weights; the first is not timed
A6000_GIB = 47.54
LATE_KERNELS_BYTES = GIB // 2  # as much again as the context: CUDA loads kernels into it on first use
HIDDEN, INNER, HEAD, LAYERS, VOCABULARY = 8192, 22016, 128, 80, 32000  # LLaMA-65B


def llama_65b(layers: int = LAYERS, hidden: int = HIDDEN) -> dict[str, Any]:
    """config.json of LLaMA-65B, or of a smaller model with the same proportions."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": INNER * hidden // HIDDEN // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // HEAD),
        "num_key_value_heads": max(1, hidden // HEAD),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def write_inputs(folder: Path, shapes: dict[str, Any], row_tokens: int, num_rows: int) -> None:
    """A stand-in folder for the model (config, a tokenizer of the same vocabulary size), and rows of random tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(shapes, indent=1))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, shapes["vocab_size"])}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(num_rows):
            # the end token is learned, as the trainer requires
            ids = [*generator.integers(3, shapes["vocab_size"], row_tokens - 1).tolist(), shapes["eos_token_id"]]
            file.write(json.dumps({"input_ids": ids}) + "\n")


def configure(arguments: argparse.Namespace) -> RunConfig:
    """The recipe with the changes of the command line."""
    run = [f"run_dir={arguments.work / 'run'}", "logging.trackers=[]"]
    config = load_config(RECIPE, (*arguments.overrides, *run))
    if not arguments.is_stand_in:
        steps = [] if arguments.steps is None else [f"train.steps={arguments.steps}"]
        return load_config(RECIPE, (*arguments.overrides, *run, *steps))
    steps = MEASURED_STEPS if arguments.steps is None else arguments.steps
    shapes = llama_65b(arguments.layers, arguments.hidden)
    write_inputs(arguments.work, shapes, config.data.row_tokens, config.batch.rows_per_step * min(steps, 16))
    if arguments.sparse_weights is not None:
        write_sparse_weights(arguments.work / "model", arguments.sparse_weights)
    inputs = (
        "device=auto",  # a scaled-down stand-in also runs on a CPU
        f"model.name={arguments.work / 'model'}",
        f"model.weights={'random' if arguments.random_weights else 'files'}",
        f"data.train=[{{path: {arguments.work / 'rows.jsonl'}, format: tokens}}]",
        "data.eval=[]",
        f"data.cache_dir={arguments.work / 'cache'}",
        f"train.steps={steps}",
        "train.eval_every=null",
        "train.save_every=null",
    )
    return load_config(RECIPE, (*arguments.overrides, *run, *inputs))


def require_room(config: RunConfig, cap_bytes: int) -> int:
    """Bytes of the paged states, which fit on the card next to the rest of the plan.

    When another process occupies the rest of the card, paged states that do not fit are managed memory beyond what is
    free, which can hang a GPU. Raises SystemExit if that would happen according to the plan.
    """
    shapes = read_shapes(config.model.name, config.model.revision)
    plan = choose(config, shapes, world_size=1, device_bytes=cap_bytes)
    if plan.fits and not plan.paged_out_bytes:
        return plan.pageable_bytes
    lacking = max(plan.paged_out_bytes, plan.peak_bytes - cap_bytes)
    raise SystemExit(
        f"--crowd: of {plan.peak_bytes / GIB:.2f} GiB planned, {lacking / GIB:.2f} GiB do not fit on a card of "
        f"{cap_bytes / GIB:.2f} GiB, and managed memory beyond what is free can hang it; leave out --crowd, raise "
        "--cap-gib, or make the run smaller (--set)"
    )


def allocator_limit(cap_bytes: int, context_bytes: int, paged_bytes: int) -> int:
    """Bytes of the card that PyTorch may allocate. paged_bytes: the states that must stay on a crowded card; what the
    plan does not include (fragmentation, kernels loaded late) must not displace them."""
    return cap_bytes - context_bytes - (paged_bytes + LATE_KERNELS_BYTES if paged_bytes else 0)


@contextlib.contextmanager
def smaller_card(cap_gib: float, is_crowded: bool, paged_bytes: int = 0) -> Iterator[dict[str, Any]]:
    """Limits this process to `cap_gib` of the GPU, context included, and PyTorch to `allocator_limit`. No effect on a
    CPU."""
    if not torch.cuda.is_available():
        yield {"cap_bytes": None, "context_bytes": None, "is_crowded": False, "allocator_limit_bytes": None}
        return
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()  # includes other processes, so none should run
    cap = int(cap_gib * GIB)
    if cap > total:
        raise SystemExit(f"--cap-gib is {cap_gib}, but the card has {total / GIB:.2f} GiB; give at most that")
    limit = allocator_limit(cap, context, paged_bytes)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    facts = {"cap_bytes": cap, "context_bytes": context, "is_crowded": is_crowded, "allocator_limit_bytes": limit}
    if not is_crowded:
        yield facts
        return
    hold = (
        "import sys, torch; x = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device='cuda'); "
        "print('ready', flush=True); sys.stdin.readline()"
    )
    # the other process has its own context, about as large as this one's
    command = [sys.executable, "-c", hold, str(total - cap - context)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as neighbour:
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
        try:
            yield facts | {"free_bytes_at_start": torch.cuda.mem_get_info()[0]}
        finally:
            neighbour.communicate(b"\n")


def summarize(config: RunConfig, card: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory, speed and the duration of the whole recipe, from the run's files."""
    run = Path(config.run_dir)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    timed = lines[1:] or lines  # the first step warms up kernels and creates the optimizer states
    seconds = [line["step_seconds"] + line["data_seconds"] for line in timed]
    step_seconds = statistics.median(seconds)
    recipe_steps = load_config(RECIPE, tuple(arguments.overrides)).train.steps
    assert recipe_steps is not None
    paged = 8 * summary["trainable_parameters"] if config.optim.name == "paged_adamw_32bit" else None
    peak = max(summary["peak_bytes_max"], summary["build_peak_bytes"])
    context = card["context_bytes"] or 0
    reserved = torch.cuda.max_memory_reserved() if card["cap_bytes"] is not None else peak
    held = reserved + context  # what the card must have: no one else can use the allocator's free blocks
    is_full_size = (arguments.layers, arguments.hidden) == (LAYERS, HIDDEN)
    return {
        "benchmark": "repro_65b",
        "provenance": provenance.collect(
            provenance.this_command("benchmarks.repro_65b", arguments.command),
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        ),
        "weights": "random" if arguments.random_weights else WEIGHTS if arguments.is_stand_in else "files",
        "is_full_size": is_full_size,
        "config": json.loads(config.model_dump_json().replace(f"{provenance.ROOT}/", "")),
        "base_parameters": summary["base_parameters"],
        "trainable_parameters": summary["trainable_parameters"],
        **card,
        "peak_bytes": peak,
        "build_peak_bytes": summary["build_peak_bytes"],
        "reserved_bytes": reserved,
        "peak_with_context_bytes": peak + context,
        "reserved_with_context_bytes": held,
        "paged_optimizer_bytes": paged,
        "fits_cap_without_paging": None if card["cap_bytes"] is None else held + (paged or 0) <= card["cap_bytes"],
        "planned_peak_bytes": summary["planned_peak_bytes"],
        "plan_error": summary["plan_error"],
        "step_seconds": seconds,
        "step_seconds_median": step_seconds,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in timed),
        "recipe_steps": recipe_steps,
        "recipe_hours": step_seconds * recipe_steps / 3600 if is_full_size else None,
        "losses": [line["loss"] for line in lines],
    }


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--random-weights", action="store_true", help="Create a random model and random data.")
    weights.add_argument(
        "--sparse-weights",
        type=Path,
        metavar="FOLDER",
        help="Random data, and files of zeros in FOLDER (best on a tmpfs), for the null device only.",
    )
    parser.add_argument("--cap-gib", type=float, default=A6000_GIB, help="Memory of the emulated card.")
    parser.add_argument(
        "--crowd",
        action="store_true",
        help="Occupy the rest of the card, which must not be shared, with another process. Refused if the plan with "
        "the paged states, 8 bytes per trainable parameter, exceeds --cap-gib.",
    )
    parser.add_argument(
        "--steps", type=int, help=f"Updates (default: {MEASURED_STEPS} with random weights, else the recipe's)."
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--work", type=Path, default=Path("build/repro_65b"), help="Folder for the run.")
    parser.add_argument("--out", type=Path, help="Also write the result to this file.")
    arguments = parser.parse_args(words)
    arguments.command = words
    arguments.is_stand_in = arguments.random_weights or arguments.sparse_weights is not None
    return arguments


def main(words: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(sys.argv[1:] if words is None else words)
    try:
        provenance.commit_and_source()  # an invalid stated commit is reported before the run, not after it
    except UserError as error:
        raise SystemExit(str(error)) from None
    if arguments.is_stand_in:  # a reproduction that takes days is resumed, not restarted
        shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    config = configure(arguments)
    paged = require_room(config, int(arguments.cap_gib * GIB)) if arguments.crowd else 0
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with smaller_card(arguments.cap_gib, arguments.crowd, paged) as card:
        before = provenance.device_state(device)
        with memory.DeviceWatch(device, interval_seconds=0.1) as watch:
            train(config)
        states = {"before": before, "after": provenance.device_state(device)}
    result = summarize(config, card, arguments) | {"device_used_bytes": watch.peak_bytes, "device_state": states}
    text = json.dumps(result, indent=1)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    print(text)
    return result


if __name__ == "__main__":
    main()
