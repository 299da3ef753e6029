"""`qlora-dist data`: what a run would learn from, shown before it learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ...config import RunConfig, SourceConfig
from ...data.documents import Documents, build_documents, split_sources
from ...data.packing import Rows, one_document_per_row, pack_best_fit
from .html import write_html
from .measure import Audit, Run, Sample, audit, sample_of
from .terminal import print_audit

__all__ = ["Audit", "Run", "Sample", "audit", "print_audit", "run_data_command", "sample_of", "write_html"]


def run_data_command(
    config: RunConfig, tokenizer: Any, show: int = 3, html: str | None = None, console: Console | None = None
) -> list[Audit]:
    """Builds (or reads) the documents of a config, prints what is in them and writes the page if asked to."""
    train_sources, eval_sources = split_sources(config.data.train, config.data.eval)
    trained = _documents(config, train_sources, tokenizer)
    audits = [_audit(config, "data.train", trained, tokenizer, show, None)]
    if eval_sources:
        held_out = _documents(config, eval_sources, tokenizer)
        audits.append(_audit(config, "data.eval", held_out, tokenizer, show, trained))
    console = console or Console()
    for one in audits:
        print_audit(one, console)
    if html is not None:
        write_html(audits, html)
        console.print(f"written to {html}")
    return audits


def _documents(config: RunConfig, sources: Sequence[SourceConfig], tokenizer: Any) -> Documents:
    data = config.data
    return build_documents(
        sources,
        tokenizer,
        row_tokens=data.row_tokens,
        on_long=data.on_long,
        on_bad=data.on_bad,
        learn=data.learn,
        template=data.template,
        cache_dir=data.cache_dir,
        seed=config.seed,
        num_workers=data.num_workers,
    )


def _audit(
    config: RunConfig, name: str, documents: Documents, tokenizer: Any, show: int, trained_on: Documents | None
) -> Audit:
    rows: Rows
    if config.data.packing:
        rows = pack_best_fit(documents.lengths, config.data.row_tokens, config.seed)
    else:
        rows = one_document_per_row(documents.lengths, config.data.row_tokens)
    return audit(
        documents,
        rows,
        tokenizer,
        name=name,
        template=config.data.template,
        micro_rows=1 if config.batch.micro_rows == "auto" else config.batch.micro_rows,
        show=show,
        seed=config.seed,
        trained_on=trained_on,
    )
