"""build_data: what a run would learn from, before it does: documents, rows, and which tokens are learned."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, overload

from ..commands.data_report.measure import Audit, Sample, audit, sample_of
from ..commands.preflight import check_data
from ..config import RunConfig
from ..console import Console
from ..data.documents import Documents, split_sources
from ..data.from_config import build_rows, documents_of
from ..data.packing import Rows
from ..data.tokenizer import load_tokenizer
from ..errors import printable
from .configs import ConfigLike, load_config
from .unchanged import unchanged

LEARNED = "[[", "]]"  # around what is learned
_COUNTS = ("records", "tokens", "labels", "truncated", "dropped", "bad", "duplicates")


@dataclass(frozen=True, repr=False)
class Document:
    """One document as the model sees it."""

    sample: Sample

    @property
    def source(self) -> str:
        """The path or name in the config."""
        return self.sample.source

    @property
    def num_tokens(self) -> int:
        return self.sample.num_tokens

    @property
    def num_labels(self) -> int:
        """Tokens that are learned."""
        return self.sample.num_labels

    def decode(self, mark: tuple[str, str] | None = LEARNED) -> str:
        """Its text, with what is learned between the two texts of `mark`; None: unmarked."""
        before, after = mark or ("", "")
        pieces = []
        for is_label, text in _spans(self.sample):
            pieces.append(f"{before}{text}{after}" if is_label else text)
        return "".join(pieces)

    def __repr__(self) -> str:
        return printable(self.decode())

    def _repr_html_(self) -> str:
        pieces = []
        for is_label, text in _spans(self.sample):
            shown = html.escape(printable(text))
            pieces.append(f'<mark style="background:#cde8cd;color:#000">{shown}</mark>' if is_label else shown)
        title = f"{self.source}, document {self.sample.index}: {self.num_tokens:,} tokens, {self.num_labels:,} learned"
        head = f"<div><b>{html.escape(printable(title))}</b></div>"
        return f'{head}<pre style="white-space:pre-wrap">{"".join(pieces)}</pre>'


@dataclass(frozen=True, repr=False)
class PackedRow:
    """Whole documents that share a row; none of them sees another."""

    index: int
    documents: list[Document]
    row_tokens: int

    @property
    def num_tokens(self) -> int:
        """Of the row's `row_tokens`."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def num_labels(self) -> int:
        """Tokens that are learned."""
        return sum(document.num_labels for document in self.documents)

    def decode(self, mark: tuple[str, str] | None = LEARNED) -> str:
        """The documents below each other, with what is learned between the two texts of `mark`."""
        return "\n".join(document.decode(mark) for document in self.documents)

    def __repr__(self) -> str:
        return printable(self.decode())

    def _repr_html_(self) -> str:
        head = f"row {self.index}: {len(self.documents)} documents, {self.num_tokens:,} of {self.row_tokens:,} tokens"
        return f"<div>{head}</div>" + "".join(document._repr_html_() for document in self.documents)


class BuiltData(Sequence[PackedRow]):
    """Tokenized and packed data: a sequence of rows, before they are shuffled."""

    def __init__(self, config: RunConfig, name: str, documents: Documents, tokenizer: Any) -> None:
        self.config = config
        self.name = name  # data.train or data.eval
        self.documents: Documents = documents  # the store: lengths, num_labels, ... as arrays
        self.rows: Rows = build_rows(config.data, documents, config.seed)
        self.tokenizer = tokenizer
        self.held_out: BuiltData | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> PackedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedRow]: ...

    def __getitem__(self, index: int | slice) -> PackedRow | list[PackedRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        return PackedRow(row.index, [self.document(one) for one in row.documents], self.rows.row_tokens)

    def document(self, index: int) -> Document:
        """One document by its number, in the order of the sources."""
        return Document(sample_of(self.documents, range(len(self.documents))[index], self.tokenizer))

    @property
    def counts(self) -> dict[str, int | float]:
        """Records read, documents and rows made of them, how full the rows are, tokens, labels, and what was lost."""
        found: dict[str, int | float] = {"documents": len(self.documents), "rows": len(self)}
        found["efficiency"] = round(self.rows.efficiency, 4)
        return found | {name: self.documents.stats.total(name) for name in _COUNTS}

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The same of each source, with its format and template; ready for a DataFrame."""
        return [asdict(source) for source in self.documents.stats.sources]

    @cached_property
    def audit(self) -> Audit:
        """All that `qlora-dist data` shows."""
        micro_rows = self.config.batch.micro_rows
        return audit(
            self.documents,
            self.rows,
            self.tokenizer,
            name=self.name,
            template=self.config.data.template,
            micro_rows=micro_rows if isinstance(micro_rows, int) else 1,
            seed=self.config.seed,
        )

    @property
    def warnings(self) -> list[str]:
        """What is odd about the data."""
        return self.audit.warnings

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {value:,}" for name, value in self.counts.items())
        return f"<{self.name}: {counts}>"

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><th style="text-align:left">{name}</th><td>{value:,}</td></tr>' for name, value in self.counts.items()
        )
        notes = "".join(f"<div>{html.escape(printable(f'warning: {warning}'))}</div>" for warning in self.warnings)
        return f"<table><caption>{self.name}</caption>{cells}</table>{notes}"


def build_data(config: ConfigLike, **overrides: Any) -> BuiltData:
    """Tokenizes and packs the data of a config, or reads what was tokenized before. Needs the model's tokenizer, not
    its weights. `held_out` has the held-out data, if any. `overrides`: as for `load_config`. Raises UserError.

        data = build_data("run.yaml"); print(data[0].decode())
    """
    loaded = load_config(config, **overrides)
    check_data(loaded)
    with unchanged(), Console(True, sys.stdout):
        tokenizer = load_tokenizer(loaded.model.name, loaded.model.revision)
        trained_on, evaluated_on = split_sources(loaded.data.train, loaded.data.eval)
        documents = documents_of(loaded.data, trained_on, tokenizer, loaded.seed)
        built = BuiltData(loaded, "data.train", documents, tokenizer)
        if evaluated_on:
            unseen = documents_of(loaded.data, evaluated_on, tokenizer, loaded.seed)
            built.held_out = BuiltData(loaded, "data.eval", unseen, tokenizer)
    return built


def _spans(sample: Sample) -> Iterator[tuple[bool, str]]:
    """(is learned, text) of consecutive tokens; special tokens belong to the span that they are in."""
    is_label, pieces = False, list[str]()
    for run in sample.runs:
        if run.is_label != is_label and pieces:
            yield is_label, "".join(pieces)
            pieces = []
        is_label = run.is_label
        pieces.append(run.text)
    if pieces:
        yield is_label, "".join(pieces)
