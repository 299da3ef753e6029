"""`qlora-dist data`: shows what a run would learn from, before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ...config import RunConfig
from ...data.documents import Documents, split_sources
from ...data.from_config import build_rows, documents_of
from ...errors import printable
from ..screen import styled
from .html import write_html
from .measure import Audit, Run, Sample, audit, sample_of
from .terminal import print_audit

__all__ = ["Audit", "Run", "Sample", "audit", "print_audit", "run_data_command", "sample_of", "write_html"]


def run_data_command(
    config: RunConfig, tokenizer: Any, show: int = 3, html: str | Path | None = None, console: Console | None = None
) -> list[Audit]:
    """Builds (or reads) the documents of a config, prints their audits and, if `html` is set, writes the page."""
    train_sources, eval_sources = split_sources(config.data.train, config.data.eval)
    trained = documents_of(config.data, train_sources, tokenizer, config.seed)
    audits = [_audit(config, "data.train", trained, tokenizer, show, None)]
    if eval_sources:
        held_out = documents_of(config.data, eval_sources, tokenizer, config.seed)
        audits.append(_audit(config, "data.eval", held_out, tokenizer, show, trained))
    console = console or Console(file=styled())
    for one in audits:
        print_audit(one, console)
    if html is not None:
        write_html(audits, html)
        console.print(Text(printable(f"written to {html}")))
    return audits


def _audit(
    config: RunConfig, name: str, documents: Documents, tokenizer: Any, show: int, trained_on: Documents | None
) -> Audit:
    return audit(
        documents,
        build_rows(config.data, documents, config.seed),
        tokenizer,
        name=name,
        template=config.data.template,
        micro_rows=1 if config.batch.micro_rows == "auto" else config.batch.micro_rows,
        show=show,
        seed=config.seed,
        trained_on=trained_on,
    )
