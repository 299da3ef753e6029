"""A source of the config -> its records and fingerprint; which sources are trained on and which are evaluated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...config import SourceConfig
from ...errors import MachineFailed, UserError
from ...files import digests, identity
from ..formats import RawRecord, available_splits, find_files, is_local, parse_split, read_file, read_hub

# applied after tokenization (select.py): they do not change the tokens
_SELECTION = {"weight", "shuffle", "hold_out", "part", "name"}


@dataclass(frozen=True)
class OpenSource:
    """A readable source: its records, and a key that changes when they do."""

    records: Iterator[RawRecord]
    key: dict[str, Any]
    num_bytes: int  # 0: unknown
    files: Mapping[Path, tuple[int, ...]]  # what was hashed for the key -> its identity before

    def require_unchanged(self) -> None:
        """After the records were read: raises MachineFailed when they may not be those that the key is of."""
        for file, before in self.files.items():
            if identity(file.stat()) != before:
                raise MachineFailed(
                    f"data source {file} was written to or replaced while it was being read; nothing was kept of it. "
                    "Start the same command again when the file is complete"
                )


def open_source(source: SourceConfig) -> OpenSource:
    """Raises UserError if it does not exist."""
    key = source.model_dump(mode="json", exclude=_SELECTION)
    if source.shuffle:  # then the cap is part of the selection too
        key["max_examples"] = None
    records: Iterator[RawRecord]
    identities = {}
    if is_local(source.path):
        for option in ("subset", "revision"):
            if getattr(source, option) is not None:
                raise UserError(
                    f"data source {source.path}: {option} is set, which only hub datasets have; remove it, or give the "
                    "path of the files that it means"
                )
        files = find_files(source.path, source.split)
        identities = {file: identity(file.stat()) for file in files}
        key |= {"path": "", "files": [[digest, file.suffix] for digest, file in zip(digests(files), files)]}
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
    return OpenSource(islice(records, key["max_examples"]), key, num_bytes, identities)


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
