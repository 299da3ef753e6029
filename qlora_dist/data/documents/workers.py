"""Encodes records in this process or, for large data, in worker processes of `datasets`, with the same result."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...progress import followed, track
from ..formats import BadRecord, RawRecord
from .encode import Encoded, Encoder

_BATCH_RECORDS = 256
# below this, starting workers costs more than it saves
_BYTES_PER_WORKER = 32 * 2**20
_MAX_WORKERS = 8
_FLAGS = ("is_text", "has_empty_answer", "has_replacement", "is_unrolled")


@dataclass(frozen=True)
class EncodedRecord:
    """The documents of one record, or the problem with it."""

    where: str
    documents: list[Encoded] = field(default_factory=list)
    problem: str | None = None
    unread: frozenset[str] = frozenset()  # names of fields that have a value but no use


def choose_workers(num_bytes: int) -> int:
    """Number of processes for a source of this size: one if it is small or unknown."""
    return max(1, min(_MAX_WORKERS, os.cpu_count() or 1, num_bytes // _BYTES_PER_WORKER))


def encode_records(
    encoder: Encoder, records: Iterator[RawRecord], num_workers: int, scratch: Path, stop_at_bad: bool
) -> Iterator[EncodedRecord]:
    """Encodes in order. With `stop_at_bad`, the first record that cannot be used raises UserError.

    Workers read and write Arrow files below `scratch`, so memory use does not grow with the data.
    """
    if num_workers > 1:
        yield from _encode_in_workers(encoder, records, num_workers, scratch, stop_at_bad)
        return
    while batch := list(islice(records, _BATCH_RECORDS)):
        yield from _encode_batch(encoder, batch, stop_at_bad)


def _encode_batch(encoder: Encoder, batch: list[RawRecord], stop_at_bad: bool) -> Iterator[EncodedRecord]:
    results = encoder.encode(batch)
    for raw, result, unread in zip(batch, results, encoder.unread):
        if not isinstance(result, BadRecord):
            yield EncodedRecord(raw.where, result, unread=frozenset(unread))
        elif stop_at_bad:
            raise UserError(f"{raw.where}: {result}; fix it, or set data.on_bad=skip to skip and count such records")
        else:
            yield EncodedRecord(raw.where, problem=str(result))


def _encode_in_workers(
    encoder: Encoder, records: Iterator[RawRecord], num_workers: int, scratch: Path, stop_at_bad: bool
) -> Iterator[EncodedRecord]:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder = scratch / "workers"
    folder.mkdir()
    raw_file = folder / "records.arrow"
    with ArrowWriter(path=str(raw_file), features=datasets.Features({"raw": datasets.Value("large_string")})) as writer:
        num_records = 0
        for raw in records:
            # as text: Arrow's types would add the fields of all other records to each one, as nulls
            writer.write({"raw": _as_json(raw)})
            num_records += 1
        writer.finalize()
    done = folder / "done"  # a byte for each record: the workers share no memory with this process
    done.touch()
    with track("tokenizing record", num_records) as task, followed(task, lambda: done.stat().st_size):
        encoded = datasets.Dataset.from_file(str(raw_file)).map(
            _Worker(encoder, stop_at_bad, done),
            with_indices=True,
            batched=True,
            batch_size=_BATCH_RECORDS,
            num_proc=min(num_workers, max(1, num_records)),
            remove_columns=["raw"],
            features=_features(datasets),
            cache_file_name=str(folder / "encoded.arrow"),
            load_from_cache_file=False,
            new_fingerprint="encoded",  # the store has its own; a tokenizer's pickle has no stable hash
            desc="tokenizing",
        )
    yield from _read_back(encoded)
    del encoded
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _as_json(raw: RawRecord) -> str:
    try:
        return json.dumps(vars(raw))
    except RecursionError:
        return json.dumps(vars(RawRecord(None, raw.where, "nested too deeply")))


class _Worker:
    """What a worker process does with a batch of raw records. Returns one row per document or problem."""

    def __init__(self, encoder: Encoder, stop_at_bad: bool, done: Path) -> None:
        self.encoder = encoder
        self.stop_at_bad = stop_at_bad
        self.done = done

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        raws = [RawRecord(**json.loads(text)) for text in batch["raw"]]
        rows: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for index, record in zip(indices, _encode_batch(self.encoder, raws, self.stop_at_bad)):
            documents: list[Encoded | None] = [*record.documents] or [None]
            for document in documents:
                values: tuple[Any, ...] = (
                    index,
                    record.where,
                    record.problem,
                    sorted(record.unread),
                    _NO_IDS if document is None else document.input_ids,
                    _NO_LABELS if document is None else document.is_label,
                    () if document is None else document.control_tokens,
                    *(document is not None and getattr(document, flag) for flag in _FLAGS),
                )
                for name, value in zip(_COLUMNS, values):
                    rows[name].append(value)
        with open(self.done, "ab", buffering=0) as file:
            file.write(b"." * len(raws))
        return rows


# typed: Arrow would infer floats for the empty list of a record with a problem
_NO_IDS, _NO_LABELS = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_)
_COLUMNS = ("record", "where", "problem", "unread", "input_ids", "is_label", "control_tokens", *_FLAGS)


def _features(datasets: Any) -> Any:
    value = datasets.Value
    return datasets.Features(
        {
            "record": value("int64"),
            "where": value("string"),
            "problem": value("string"),
            "unread": datasets.List(value("string")),
            "input_ids": datasets.List(value("int32")),
            "is_label": datasets.List(value("bool")),
            "control_tokens": datasets.List(value("string")),
            **{flag: value("bool") for flag in _FLAGS},
        }
    )


def _read_back(encoded: Any) -> Iterator[EncodedRecord]:
    def rows() -> Iterator[dict[str, Any]]:
        for table in encoded.with_format("arrow").iter(batch_size=_BATCH_RECORDS):
            columns = {name: table.column(name).to_pylist() for name in _COLUMNS if name not in _LISTS}
            for name in _LISTS:
                lists = table.column(name).combine_chunks()
                values = lists.flatten().to_numpy(zero_copy_only=False)
                columns[name] = np.split(values, np.cumsum(lists.value_lengths().to_numpy())[:-1])
            for i in range(table.num_rows):
                yield {name: columns[name][i] for name in _COLUMNS}

    for _, group in groupby(rows(), key=lambda row: row["record"]):
        members = list(group)
        documents = [
            Encoded(
                row["input_ids"],
                row["is_label"],
                control_tokens=tuple(row["control_tokens"]),
                **{flag: row[flag] for flag in _FLAGS},
            )
            for row in members
            if row["problem"] is None
        ]
        first = members[0]
        yield EncodedRecord(first["where"], documents, first["problem"], frozenset(first["unread"]))


_LISTS = ("input_ids", "is_label")
