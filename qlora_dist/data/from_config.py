"""Documents and rows by the settings of a config's data section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import DataConfig, SourceConfig
from .documents import Documents, build_documents
from .packing import Rows, one_document_per_row, pack_best_fit


def documents_of(
    data: DataConfig, sources: Sequence[SourceConfig], tokenizer: Any, seed: int, *, is_checked: bool = False
) -> Documents:
    """Tokenized documents of some sources, by the settings of the data section. See `build_documents`."""
    return build_documents(
        sources,
        tokenizer,
        row_tokens=data.row_tokens,
        on_long=data.on_long,
        on_bad=data.on_bad,
        learn=data.learn,
        template=data.template,
        date=data.date,
        cache_dir=data.cache_dir,
        seed=seed,
        num_workers=data.num_workers,
        is_checked=is_checked,
    )


def build_rows(data: DataConfig, documents: Documents, seed: int) -> Rows:
    """Documents -> rows, packed or one document each."""
    if data.packing:
        return pack_best_fit(documents.lengths, data.row_tokens, seed)
    return one_document_per_row(documents.lengths, data.row_tokens)
