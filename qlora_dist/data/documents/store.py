"""Tokenized documents on disk: written once, memory-mapped by every rank. Only per-document numbers are in memory.

One folder per dataset, named by its fingerprint: input_ids.bin (int32), is_label.bin (one byte per token), one .npy
per document property, stats.json and, last, manifest.json with the size and hash of the others. It is written under
a temporary name and renamed, so a folder with the final name is complete; the manifest detects later damage.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...files import is_whole, read_manifest, write_manifest
from ..packing import Example
from .encode import Encoded

# part of every fingerprint: increase it when the same inputs give different tokens or a different file layout
STORE_VERSION = 4

# files up to this size are hashed on each start, larger ones checked by size (the rename proves they were complete)
_HASH_LIMIT = 64 * 2**20
_MAX_NAMED = 8  # control tokens named per source
HEAD = {"version": STORE_VERSION}  # of the manifest


@dataclasses.dataclass
class SourceStats:
    """What became of the records of one source. `examples`, `tokens`, `labels` count what is used."""

    path: str
    format: str = ""
    why: str = ""  # how the format was determined
    template: str = ""
    records: int = 0  # read
    examples: int = 0
    bad: int = 0  # records that could not be used, skipped
    truncated: int = 0  # conversations cut to row_tokens: they end without EOS
    split: int = 0  # texts split into several examples; nothing is lost
    dropped: int = 0  # examples that were too long or had no label left
    duplicates: int = 0  # examples with the same tokens as an earlier one, of any source
    empty_answers: int = 0
    replacement_characters: int = 0  # examples with U+FFFD: text that was once decoded incorrectly
    control_tokens: int = 0  # conversations whose own text spells out a control token
    control_token_names: str = ""  # the first few of these tokens
    unrolled: int = 0  # documents with one answer each, of conversations that no single document could hold
    tokens: int = 0
    labels: int = 0
    lost_tokens: int = 0  # of truncated and dropped examples
    first_bad: str = ""  # message
    unread: dict[str, int] = dataclasses.field(default_factory=dict)  # field that nothing reads -> records with it

    def unread_text(self) -> str:
        """The fields that nothing reads, most frequent first; empty if there are none."""
        fields = sorted(self.unread.items(), key=lambda field: (-field[1], field[0]))
        return ", ".join(f"{name} ({count:,})" for name, count in fields)

    def name_control_tokens(self, tokens: Sequence[str]) -> None:
        """Counts a conversation that spells out these control tokens."""
        self.control_tokens += bool(tokens)
        names = self.control_token_names.split(", ") if self.control_token_names else []
        if len(names) < _MAX_NAMED:
            self.control_token_names = ", ".join(dict.fromkeys([*names, *tokens][:_MAX_NAMED]))


@dataclasses.dataclass
class DataStats:
    """All sources of a dataset."""

    sources: list[SourceStats]

    def total(self, name: str) -> int:
        return sum(getattr(source, name) for source in self.sources)


class Store:
    """One folder of tokenized documents, as written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lengths = np.load(folder / "lengths.npy")  # (D,) int32
        self.num_labels = np.load(folder / "num_labels.npy")  # (D,) int32
        self.source_of = np.load(folder / "source_of.npy")  # (D,) int32, index into stats
        self.record_of = np.load(folder / "record_of.npy")  # (D,) int32, record of its source
        self.hashes = np.load(folder / "hashes.npy")  # (D,) uint64, of the tokens: equal documents, equal hashes
        self.stats = [SourceStats(**source) for source in json.loads((folder / "stats.json").read_text())]
        files = read_manifest(folder)["files"]
        tokens = [files[name]["sha256"] for name in ("input_ids.bin", "is_label.bin", "lengths.npy")]
        self.content_digest = "".join(tokens).encode()
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self._input_ids = np.memmap(folder / "input_ids.bin", dtype=np.int32, mode="r")
        self._is_label = np.memmap(folder / "is_label.bin", dtype=np.bool_, mode="r")

    @property
    def largest_id(self) -> int:
        return int(self._input_ids.max())

    def __getitem__(self, index: int) -> Example:
        end = int(self._ends[index])
        begin = end - int(self.lengths[index])
        return Example(np.array(self._input_ids[begin:end]), np.array(self._is_label[begin:end]))


class Documents:
    """The documents of a run: a selection (weights, caps, held-out records) from a store."""

    def __init__(self, store: Store, chosen: np.ndarray, fingerprint: str) -> None:
        """`chosen`: (D,) documents of the store; one that appears twice is used twice per epoch."""
        self._store = store
        self._chosen = chosen
        self.fingerprint = fingerprint
        self.lengths = store.lengths[chosen]  # (D,) int32
        self.num_labels = store.num_labels[chosen]  # (D,) int32
        self.source_of = store.source_of[chosen]  # (D,) int32, index into stats.sources
        self.hashes = store.hashes[chosen]  # (D,) uint64
        self.stats = DataStats([dataclasses.replace(source) for source in store.stats])
        for i, source in enumerate(self.stats.sources):
            of_source = self.source_of == i
            source.examples = int(of_source.sum())
            source.tokens = int(self.lengths[of_source].sum())
            source.labels = int(self.num_labels[of_source].sum())

    @property
    def largest_id(self) -> int:
        """The largest token id of the store. Reads all of its tokens."""
        return self._store.largest_id

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Example:
        return self._store[int(self._chosen[index])]


class StoreWriter:
    """Context manager that writes a store into an empty folder; `finish` completes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._columns = {
            "lengths": array.array("i"),
            "num_labels": array.array("i"),
            "source_of": array.array("i"),
            "record_of": array.array("i"),
            "hashes": array.array("Q"),
        }

    def __enter__(self) -> StoreWriter:
        self._ids = (self.folder / "input_ids.bin").open("wb")
        self._labels = (self.folder / "is_label.bin").open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._ids.close()
        self._labels.close()

    def add(self, encoded: Encoded, source: int, record: int) -> None:
        ids = encoded.input_ids.tobytes()
        self._ids.write(ids)
        self._labels.write(encoded.is_label.tobytes())
        digest = hashlib.blake2b(ids, digest_size=8).digest()
        values = (len(encoded.input_ids), int(encoded.is_label.sum()), source, record, int.from_bytes(digest, "little"))
        for column, value in zip(self._columns.values(), values):
            column.append(value)

    def finish(self, stats: list[SourceStats]) -> None:
        self._ids.close()
        self._labels.close()
        columns = {name: np.array(values) for name, values in self._columns.items()}
        _count_duplicates(stats, columns["hashes"], columns["source_of"])
        for name, values in columns.items():
            np.save(self.folder / f"{name}.npy", values)
        (self.folder / "stats.json").write_text(json.dumps([dataclasses.asdict(source) for source in stats]))
        write_manifest(self.folder, HEAD)


def _count_duplicates(stats: list[SourceStats], hashes: np.ndarray, source_of: np.ndarray) -> None:
    first = np.unique(hashes, return_index=True)[1]
    is_repeated = np.ones(len(hashes), dtype=np.bool_)
    is_repeated[first] = False
    for i, source in enumerate(stats):
        source.duplicates = int(is_repeated[source_of == i].sum())


def has_store(folder: Path) -> bool:
    """Whether a store of this name exists and is intact."""
    return is_whole(folder, HEAD, _HASH_LIMIT)
