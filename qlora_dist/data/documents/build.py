"""Step 3 of the data pipeline: sources -> Documents. Reads, encodes, limits lengths and writes, or uses the cache."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ... import __version__
from ...cluster.file_lock import build_once
from ...config import SourceConfig
from ...errors import UserError, os_errors
from ...files import folder_aside, sha256
from ...progress import track
from ..formats import RawRecord, check_columns, detect_format, group_records, map_columns
from ..templates import template_key
from .encode import Encoded, Encoder, check_tokenizer
from .select import select_documents
from .sources import OpenSource, open_source
from .store import STORE_VERSION, Documents, SourceStats, Store, StoreWriter, check_store, open_store
from .workers import EncodedRecord, choose_workers, encode_records

logger = logging.getLogger(__name__)


def build_documents(
    sources: Sequence[SourceConfig],
    tokenizer: Any,
    *,
    row_tokens: int,
    on_long: str = "truncate",
    on_bad: str = "error",
    learn: str = "assistant",
    template: str = "auto",
    date: str | None = None,
    cache_dir: str | Path,
    seed: int = 0,
    num_workers: int | None = None,
    is_checked: bool = False,
) -> Documents:
    """The tokenized documents of all sources, one after another, selected by weights, caps and held-out records.

    The first call writes a store below `cache_dir`; later calls with the same data, tokenizer and settings read it.
    When several processes call at once, one builds and the others wait. Raises UserError with file, row and field
    for anything that cannot be used. `date` (YYYY-MM-DD): what templates that write the date are told; None is today.
    `is_checked`: another process of this node has just called this, so that its files need not be hashed again.
    """
    check_tokenizer(tokenizer)
    opened = [open_source(source) for source in sources]
    settings: dict[str, Any] = {"row_tokens": row_tokens, "on_long": on_long, "on_bad": on_bad, "learn": learn}
    fingerprint = _fingerprint(opened, tokenizer, template_key(tokenizer, template, date), settings)
    folder = Path(cache_dir).expanduser() / fingerprint
    builds = Build(tokenizer, template=template, date=date, num_workers=num_workers, **settings)
    build_once(
        folder,
        check=lambda: check_store(folder, "none" if is_checked else "recorded"),
        build=lambda: builds.run(sources, opened, folder),
        what="tokenizing the same data",
        setting="data.cache_dir",
    )
    return _selected(open_store(folder), sources, seed)


def _selected(store: Store, sources: Sequence[SourceConfig], seed: int) -> Documents:
    num_records = [stats.records for stats in store.stats]
    chosen = select_documents(sources, num_records, store.source_of, store.record_of, seed)
    for stats, source in zip(store.stats, sources):
        stats.path = source.path  # the same content may have been tokenized from another path
    if len(chosen) == 0:
        raise UserError(
            f"data sources {', '.join(source.path for source in sources)}: no examples are left after weights, "
            "max_examples and hold_out"
        )
    # of the tokens, not of their origin: nodes that tokenized separately can be compared
    digest = hashlib.sha256(store.content_digest + chosen.tobytes())
    return Documents(store, chosen, digest.hexdigest()[:20])


@dataclasses.dataclass(frozen=True)
class Build:
    """One build of a store: the settings shared by all of its sources."""

    tokenizer: Any
    row_tokens: int
    on_long: str
    on_bad: str
    learn: str
    template: str
    date: str | None
    num_workers: int | None

    def run(self, sources: Sequence[SourceConfig], opened: Sequence[OpenSource], folder: Path) -> None:
        stats = [SourceStats(source.path) for source in sources]
        with (
            os_errors(f"data.cache_dir {folder.parent}: the tokenized data cannot be written", "Nothing is left there"),
            folder_aside(folder, replaces=False) as aside,
            StoreWriter(aside) as writer,
        ):
            for i, source in enumerate(sources):
                self._add_source(writer, i, source, opened[i], stats[i])
                opened[i].require_unchanged()
            _check_not_empty(stats, self.row_tokens)
            writer.finish(stats)
        logger.info("tokenized data: written to %s", folder)

    def _add_source(
        self, writer: StoreWriter, index: int, source: SourceConfig, opened: OpenSource, stats: SourceStats
    ) -> None:
        head, records = _peek(opened.records, source.path)
        check_columns(head, source.columns, source.path)
        if source.format == "auto":
            stats.format, stats.why = detect_format(map_columns(head, source.columns), source.path)
        else:
            stats.format, stats.why = source.format, "set in the config"
        encoder = Encoder(
            self.tokenizer,
            format_name=stats.format,
            columns=source.columns,
            template=self.template,
            learn=self.learn,
            date=self.date,
        )
        stats.template = "" if stats.format in ("text", "tokens") else encoder.template.name
        with_template = f", template {stats.template}" if stats.template else ""
        logger.info("%s: format %s (%s)%s", source.path, stats.format, stats.why, with_template)
        workers = self.num_workers or choose_workers(opened.num_bytes)
        grouped = group_records(stats.format, records)
        with track("tokenizing record") as task:
            for record in encode_records(encoder, grouped, workers, writer.folder, self.on_bad == "error"):
                if record.problem is not None:
                    stats.bad += 1
                    stats.first_bad = stats.first_bad or f"{record.where}: {record.problem}"
                for encoded in record.documents:
                    stats.empty_answers += encoded.has_empty_answer
                    stats.replacement_characters += encoded.has_replacement
                    stats.unrolled += encoded.is_unrolled
                    self._add(writer, index, encoded, record, stats)
                for name in record.unread:
                    stats.unread[name] = stats.unread.get(name, 0) + 1
                stats.name_control_tokens(sorted({token for one in record.documents for token in one.control_tokens}))
                stats.records += 1
                task.add()

    def _add(
        self, writer: StoreWriter, index: int, encoded: Encoded, record: EncodedRecord, stats: SourceStats
    ) -> None:
        """Applies data.on_long. A text is split, not truncated: all of it is learned."""
        num_tokens = len(encoded.input_ids)
        pieces = [encoded]
        if num_tokens > self.row_tokens:
            if self.on_long == "error":
                raise UserError(
                    f"{record.where}: {num_tokens:,} tokens but data.row_tokens is {self.row_tokens:,}; raise it, or "
                    "set data.on_long to truncate or drop"
                )
            if self.on_long == "drop":
                pieces = []
            elif encoded.is_text:
                starts = range(0, num_tokens, self.row_tokens)
                pieces = [_part(encoded, begin, begin + self.row_tokens) for begin in starts]
                stats.split += 1
            else:
                pieces = [_part(encoded, 0, self.row_tokens)]
                stats.truncated += 1
        kept = [piece for piece in pieces if piece.is_label.any()]
        for piece in kept:
            writer.add(piece, index, stats.records)
        stats.dropped += not kept
        stats.lost_tokens += num_tokens - sum(len(piece.input_ids) for piece in kept)
        stats.examples += len(kept)


def _part(encoded: Encoded, begin: int, end: int) -> Encoded:
    is_label = encoded.is_label[begin:end].copy()
    is_label[0] = False
    return dataclasses.replace(encoded, input_ids=encoded.input_ids[begin:end], is_label=is_label)


def _peek(records: Iterator[RawRecord], path: str) -> tuple[dict[str, Any], Iterator[RawRecord]]:
    """The fields of the first readable record, and all records."""
    seen: list[RawRecord] = []
    for raw in records:
        seen.append(raw)
        if raw.fields is not None or len(seen) == 1000:
            break
    if not seen:
        raise UserError(f"data source {path} is empty; expected at least one record")

    def again() -> Iterator[RawRecord]:
        yield from seen
        yield from records

    if seen[-1].fields is None:
        raise UserError(f"{seen[0].where}: {seen[0].problem}; none of the first {len(seen):,} records can be read")
    return seen[-1].fields, again()


def _check_not_empty(stats: Sequence[SourceStats], row_tokens: int) -> None:
    if any(source.examples for source in stats):
        return
    paths = ", ".join(source.path for source in stats)
    dropped, records = sum(source.dropped for source in stats), sum(source.records for source in stats)
    if not dropped:
        first = next(source.first_bad for source in stats if source.first_bad)
        raise UserError(f"data sources {paths}: none of {records:,} records can be used; the first: {first}")
    raise UserError(
        f"data sources {paths}: all {dropped:,} examples were dropped because they are longer than data.row_tokens "
        f"{row_tokens:,} or have no label within it; raise data.row_tokens"
    )


def _fingerprint(opened: Sequence[OpenSource], tokenizer: Any, template: list[Any], settings: dict[str, Any]) -> str:
    """Identifies a store by everything that determines its tokens."""
    key = {
        "version": STORE_VERSION,
        "code": _code_digest(),
        "libraries": [importlib.metadata.version(name) for name in ("tokenizers", "transformers")],
        "sources": [source.key for source in opened],
        "settings": settings,
        "template": template,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


@functools.cache
def _code_digest() -> str:
    """Of the code of this package that decides tokens and labels: another version of it makes another store."""
    digest = hashlib.sha256(__version__.encode())
    data = Path(__file__).parents[1]
    for path in sorted(path for room in ("documents", "formats", "templates") for path in (data / room).glob("*.py")):
        digest.update(f"{path.relative_to(data)} {sha256(path)}".encode())
    return digest.hexdigest()
