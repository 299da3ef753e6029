"""A source of the config -> its records and fingerprint; which sources are trained on and which are evaluated on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...config import SourceConfig
from ...errors import UserError
from ...files import sha256
from ..formats import RawRecord, available_splits, find_files, is_local, parse_split, read_file, read_hub

# files up to this size are hashed in full, larger ones at three offsets, with size and mtime
_WHOLE_HASH_LIMIT = 256 * 2**20

# applied after tokenization (select.py): they do not change the tokens
_SELECTION = {"weight", "shuffle", "hold_out", "part", "name"}


@dataclass(frozen=True)
class OpenSource:
    """A readable source: its records, and a key that changes when they do."""

    records: Iterator[RawRecord]
    key: dict[str, Any]
    num_bytes: int  # 0: unknown


def open_source(source: SourceConfig) -> OpenSource:
    """Raises UserError if it does not exist."""
    key = source.model_dump(mode="json", exclude=_SELECTION)
    if source.shuffle:  # then the cap is part of the selection too
        key["max_examples"] = None
    records: Iterator[RawRecord]
    if is_local(source.path):
        for option in ("subset", "revision"):
            if getattr(source, option) is not None:
                raise UserError(
                    f"data source {source.path}: {option} is set, which only hub datasets have; remove it, or give the "
                    "path of the files that it means"
                )
        files = find_files(source.path, source.split)
        key |= {"path": "", "files": [[_file_key(file), file.suffix] for file in files]}
        num_bytes = sum(file.stat().st_size for file in files)
        part = parse_split(source.path, source.split or "train")
        records = part.select(lambda: chain.from_iterable(map(read_file, files)))
    else:
        records, fingerprint, num_bytes = read_hub(
            source.path,
            split=source.split or "train",
            subset=source.subset,
            revision=source.revision,
            streaming=source.streaming,
        )
        key["hub"] = fingerprint
    return OpenSource(islice(records, key["max_examples"]), key, num_bytes)


def split_sources(
    train: Sequence[SourceConfig], evaluate: Sequence[SourceConfig]
) -> tuple[tuple[SourceConfig, ...], tuple[SourceConfig, ...]]:
    """Training and evaluation sources, with splits and parts filled in.

    data.eval takes precedence; a source in it without a split uses its validation split, else its test split, if it
    has one. Without data.eval, a training source with `hold_out` is evaluated on its own validation or test split if
    it has one, else on the held-out records.
    """
    training, held_out = [], []
    for source in train:
        if source.hold_out is None or source.part != "all":
            training.append(source)
            continue
        own = _held_out_split(source) if source.split is None else None
        if own is not None:
            training.append(source.model_copy(update={"hold_out": None}))
            held_out.append(source.model_copy(update={"hold_out": None, "split": own, **_UNWEIGHTED}))
        else:
            training.append(source.model_copy(update={"part": "train"}))
            held_out.append(source.model_copy(update={"part": "held_out", "weight": 1.0}))
    if evaluate:
        held_out = []
        for source in evaluate:
            own = _held_out_split(source) if source.split is None and source.part == "all" else None
            held_out.append(source if own is None else source.model_copy(update={"split": own}))
    return tuple(training), tuple(held_out)


_UNWEIGHTED = {"weight": 1.0, "max_examples": None, "shuffle": False}


def _held_out_split(source: SourceConfig) -> str | None:
    splits = available_splits(source.path, source.subset, source.revision)
    return splits.get("validation", splits.get("test"))


def _file_key(file: Path) -> str:
    status = file.stat()
    if status.st_size <= _WHOLE_HASH_LIMIT:
        return sha256(file)
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with file.open("rb") as stream:
        for offset in (0, status.st_size // 2, status.st_size - 2**20):
            stream.seek(offset)
            digest.update(stream.read(2**20))
    return digest.hexdigest()
