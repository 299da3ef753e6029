"""`qlora-dist evaluate`: held-out loss and MMLU of a run or adapter, on one process or many."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ...cluster.world import World
from ...config import DataConfig, load_config
from ...console import Console, count
from ...data.documents import split_sources
from ...data.from_config import build_rows
from ...data.loader import eval_batches
from ...data.packing import Batch
from ...errors import UserError
from ...model import check_gathered_layer, check_head, gathered_head, hidden_states, output_head
from ...model.lora import load_adapters
from ...model.loss import nll_sum
from ...train.evaluation import EvalResult, evaluate
from ...train.metrics import format_evaluation
from ...train.setup_data import documents_on_ranks
from ..trained import Trained, find_trained, load_trained_base, require_memory
from .mmlu import MmluResult, Question, read_questions, score
from .mmlu import describe as describe_mmlu


@dataclass(frozen=True)
class MmluTask:
    """Where MMLU's questions are and how to ask them."""

    folder: str
    split: str = "test"
    shots: int = 5
    max_tokens: int = 2048


@dataclass(frozen=True)
class Evaluation:
    """Results of one model; None for a task that was not requested."""

    held_out: EvalResult | None
    mmlu: MmluResult | None


def evaluate_trained(
    path: str | Path,
    *,
    config: str | None = None,
    base: str | None = None,
    micro_rows: int = 1,
    with_base: bool = False,
    perplexity: bool = True,
    mmlu: MmluTask | None = None,
) -> dict[str, Evaluation]:
    """Results of the trained model, and with `with_base` of the base without the adapter, by name. The base of an fsdp
    run is sharded over the ranks, as it was in training.

    Held-out data are the run's, or those of the data section of another `config`. Raises UserError when there are
    none, before the model is read.
    """
    trained = find_trained(path, base)
    held_out = _held_out_of(trained, config, path) if perplexity else None
    questions = read_questions(mmlu.folder, mmlu.split) if mmlu is not None else []
    worked = read_questions(mmlu.folder, "dev") if mmlu is not None and mmlu.shots else []
    world = World.init()
    with Console(world.rank == 0, sys.stderr) as console, console.watched(lambda: world.status):
        results = _measured(world, console, trained, held_out, questions, worked, micro_rows, with_base, mmlu)
    world.close()
    return results


def _measured(
    world: World,
    console: Console,
    trained: Trained,
    held_out: tuple[DataConfig, int] | None,
    questions: list[Question],
    worked: list[Question],
    micro_rows: int,
    with_base: bool,
    mmlu: MmluTask | None,
) -> dict[str, Evaluation]:
    """Results by name. Progress goes to stderr: stdout is for results."""
    tokenizer = trained.load_tokenizer()
    batches: list[Batch] = []
    if held_out is not None:
        data, seed = held_out
        _, sources = split_sources(data.train, data.eval)
        documents = documents_on_ranks(data, sources, tokenizer, world, "data.eval", seed)
        rows = build_rows(data, documents, seed)
        batches = eval_batches(documents, rows, micro_rows, world.rank, world.size)
        console.print(f"{count(len(documents), 'held-out example')} in {count(len(rows), 'row')}")
    world.set_status(f"loading {trained.model.name}")
    row_tokens = max(0 if held_out is None else held_out[0].row_tokens, 0 if mmlu is None else mmlu.max_tokens)
    if memory := require_memory(trained, world, micro_rows * row_tokens):
        console.print(memory, "memory")
    shards = trained.shards(world)
    module = load_trained_base(trained, world.device, trained.model.attention, shards)
    check_head(module)
    check_gathered_layer(module)
    head = output_head(module)

    def batch_nll(batch: Batch) -> torch.Tensor:
        hidden = hidden_states(module, batch)
        return nll_sum(hidden, gathered_head(head), batch.label_positions, batch.labels)

    def label_logits(batch: Batch) -> torch.Tensor:
        return gathered_head(head).logits(hidden_states(module, batch)[batch.label_positions])

    def measure(name: str) -> Evaluation:
        world.set_status(f"evaluating the {name} model")
        result = evaluate(module, batches, batch_nll, world, what=f"{name} model, batch") if batches else None
        scored = None
        if mmlu is not None:
            scored = score(
                module,
                label_logits,
                tokenizer,
                questions,
                worked,
                shots=mmlu.shots,
                max_tokens=mmlu.max_tokens,
                micro_rows=micro_rows,
                world=world,
                rank=world.rank,
                world_size=world.size,
                what=f"{name} model, MMLU batch",
            )
        return Evaluation(result, scored)

    results = {}
    if with_base and trained.adapter is not None:
        results["base"] = measure("base")
    if trained.adapter is not None:
        module = load_adapters(module, {"trained": trained.adapter})
    results["trained"] = measure("trained")
    return results


def describe(evaluation: Evaluation) -> list[str]:
    """One line per task."""
    lines = []
    if (held_out := evaluation.held_out) is not None:
        lines.append(f"{format_evaluation(held_out.loss, held_out.perplexity)} ({held_out.num_labels:,} labels)")
    if evaluation.mmlu is not None:
        lines.append(describe_mmlu(evaluation.mmlu))
    return lines


def _held_out_of(trained: Trained, config: str | None, path: str | Path) -> tuple[DataConfig, int]:
    """The data section that names held-out data, and the seed that selects them."""
    other = load_config(config) if config is not None else None
    data, seed = (trained.data, trained.seed) if other is None else (other.data, other.seed)
    if data is None:
        raise UserError(f"{path} is an adapter without its run; name held-out data with --config CONFIG")
    if not split_sources(data.train, data.eval)[1]:
        raise UserError(f"{config or path}: data.eval is empty; name held-out data with --config CONFIG")
    return data, seed
