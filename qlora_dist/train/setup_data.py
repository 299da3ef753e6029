"""The data of a run: sources -> documents -> rows -> this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cluster.world import World
from ..config import DataConfig, RunConfig, SourceConfig
from ..data.documents import Documents, overlap_warning, split_sources
from ..data.from_config import build_rows, documents_of
from ..data.loader import Loader, draw_rows, eval_batches
from ..data.packing import Batch, Rows
from ..data.templates import today
from ..data.tokenizer import load_tokenizer
from ..memory.read_shapes import read_shapes
from .checks.learning import check_ends_are_learned, check_every_step_has_labels, check_ids


@dataclass
class Data:
    """What is trained on and what is held out."""

    documents: Documents
    rows: Rows
    loader: Loader
    held_out: list[Batch] = field(default_factory=list)  # this rank's
    held_out_fingerprint: str | None = None  # None: nothing is held out
    num_held_out: int = 0  # rows, over all ranks
    num_evaluated: int = 0  # of these, by every evaluation during training
    notes: list[str] = field(default_factory=list)  # what the user should know of the data


def build_data(config: RunConfig, world: World) -> Data:
    """Sources -> documents -> rows -> loader. The first rank of each node tokenizes; the others read its cache."""
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    train_sources, eval_sources = split_sources(config.data.train, config.data.eval)
    documents = documents_on_ranks(config.data, train_sources, tokenizer, world, "data.train", config.seed)
    vocabulary = read_shapes(config.model.name, config.model.revision).vocabulary
    check_ids(documents, tokenizer, vocabulary)
    if config.data.require_eos:
        check_ends_are_learned(documents, tokenizer, config.seed)
    rows = build_rows(config.data, documents, config.seed)
    loader = Loader(
        documents,
        rows,
        rows_per_step=config.batch.rows_per_step,
        micro_rows=config.batch.resolved_micro_rows,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        total_rows=None if config.train.epochs is None else max(1, round(config.train.epochs * len(rows))),
    )
    data = Data(documents, rows, loader)
    if eval_sources:
        unseen = documents_on_ranks(config.data, eval_sources, tokenizer, world, "data.eval", config.seed)
        check_ids(unseen, tokenizer, vocabulary)
        warning = overlap_warning(unseen.hashes, documents.hashes)
        if warning:
            data.notes.append(f"warning: {warning}")
        _add_held_out(data, unseen, config, world)
    return data


def _add_held_out(data: Data, unseen: Documents, config: RunConfig, world: World) -> None:
    """Draws the rows that evaluations during training use, before they are shared out over the ranks."""
    rows = build_rows(config.data, unseen, config.seed)
    chosen = draw_rows(len(rows), config.train.eval_rows, config.seed)
    data.held_out = eval_batches(unseen, rows, config.batch.resolved_micro_rows, world.rank, world.size, chosen)
    data.held_out_fingerprint = unseen.fingerprint
    data.num_held_out, data.num_evaluated = len(rows), len(chosen)


def documents_on_ranks(
    data: DataConfig, sources: Sequence[SourceConfig], tokenizer: Any, world: World, what: str, seed: int
) -> Documents:
    """Tokenized documents, equal on every rank. The store's lock also keeps other jobs from building them again."""
    if data.date is None:  # without a run; ranks on both sides of midnight would differ
        data = data.model_copy(update={"date": world.from_main(lambda: today())})
    with world.stoppable(f"preparing {what}"), world.local_main_first(f"preparing {what}"):
        documents = documents_of(data, sources, tokenizer, seed, is_checked=world.local_rank != 0)
    world.require_equal(documents.fingerprint, what)
    return documents


def count_steps(config: RunConfig, data: Data) -> int:
    """Number of optimizer updates of the whole run."""
    steps = config.train.steps if config.train.steps is not None else data.loader.num_steps
    assert steps is not None
    check_every_step_has_labels(data.documents, data.rows, data.loader.rows_of_step, steps)
    return steps
