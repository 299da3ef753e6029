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

from ...errors import shortened
from ...files import DamagedFolder, Hashing, check_manifest, read_manifest, write_manifest
from ..packing import Example
from .encode import Encoded

# part of every fingerprint: increase it when the same inputs give different tokens or a different file layout
STORE_VERSION = 4

_MAX_NAMED = 8  # control tokens named per source
HEAD = {"version": STORE_VERSION}  # of the manifest
COLUMNS = {"lengths": "int32", "num_labels": "int32", "source_of": "int32", "record_of": "int32", "hashes": "uint64"}
FILES = ("input_ids.bin", "is_label.bin", *(f"{name}.npy" for name in COLUMNS), "stats.json")


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
    """One folder of tokenized documents, as written. See `open_store`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        columns = {name: np.load(folder / f"{name}.npy") for name in COLUMNS}
        self.lengths = columns["lengths"]  # (D,) int32
        self.num_labels = columns["num_labels"]  # (D,) int32
        self.source_of = columns["source_of"]  # (D,) int32, index into stats
        self.record_of = columns["record_of"]  # (D,) int32, record of its source
        self.hashes = columns["hashes"]  # (D,) uint64, of the tokens: equal documents, equal hashes
        self.stats = [SourceStats(**source) for source in json.loads((folder / "stats.json").read_text("utf-8"))]
        files = read_manifest(folder)["files"]
        tokens = [files[name]["sha256"] for name in ("input_ids.bin", "is_label.bin", "lengths.npy")]
        self.content_digest = "".join(tokens).encode()
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        self._input_ids = np.memmap(folder / "input_ids.bin", dtype=np.int32, mode="r")
        self._is_label = np.memmap(folder / "is_label.bin", dtype=np.bool_, mode="r")
        for source in self.stats:
            for field in dataclasses.fields(source):
                value = getattr(source, field.name)
                is_count = field.name == "unread" and type(value) is dict and {type(n) for n in value.values()} <= {int}
                if not is_count and type(value).__name__ != field.type:
                    raise DamagedFolder(f"stats.json: {field.name} is {shortened(value)}")
        for name, values in columns.items():
            if values.dtype != COLUMNS[name] or values.shape != (len(self.lengths),):
                raise DamagedFolder(f"{name}.npy holds {values.dtype} {values.shape}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Raises DamagedFolder when what is read by these numbers is not there: beside the digests, of their writer."""
        last_record = [self.record_of[self.source_of == i].max(initial=-1) for i in range(len(self.stats))]
        is_sound = (
            self.lengths.min() > 0
            and self._ends[-1] == len(self._input_ids) == len(self._is_label)
            and self.num_labels.min() >= 0
            and (self.num_labels <= self.lengths).all()
            and self.source_of.min() >= 0
            and self.source_of.max() < len(self.stats)
            and self.record_of.min() >= 0
            and all(last < source.records for last, source in zip(last_record, self.stats))
        )
        if not is_sound:
            raise DamagedFolder("its lengths, sources and tokens do not belong together")

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
        try:
            self._ids.close()  # on a full disk both fail, and both must be closed for their space to be freed
        finally:
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


def check_store(folder: Path, hashing: Hashing) -> None:
    """Raises DamagedFolder unless a whole store has this name: every file as it was written, and fit to be opened."""
    check_manifest(folder, HEAD, hashing=hashing, required=FILES)
    open_store(folder)


def open_store(folder: Path) -> Store:
    """A store whose files can be read, of whatever content. Raises DamagedFolder."""
    try:
        return Store(folder)
    except DamagedFolder:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, MemoryError, RecursionError) as error:
        raise DamagedFolder(f"cannot be opened ({type(error).__name__}: {shortened(str(error))})") from None
