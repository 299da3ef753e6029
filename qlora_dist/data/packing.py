"""Examples -> rows. Pure functions, and the three data types that everything else uses.

    Example  token ids and a label mask of one document
    Row      whole documents, at most row_tokens tokens in total
    Batch    the rows of one micro-step, concatenated without padding, as tensors

    documents   [a a a a] [b b] [c c c]                 row_tokens = 7
    rows        [a a a a c c c] [b b]
    batch       input_ids     a a a a c c c b b         (1, T)
                position_ids  0 1 2 3 0 1 2 0 1         (1, T)  restart at each document
                cu_seqlens    0 4 7 9                   (D + 1,) document boundaries, int32

Legend: T tokens of a micro-batch, D documents in it, N labels in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..progress import track


@dataclass(frozen=True)
class Example:
    """One document. `is_label[i]`: whether token i is learned (predicted from the tokens before it)."""

    input_ids: np.ndarray  # (L,) int32
    is_label: np.ndarray  # (L,) bool

    def __post_init__(self) -> None:
        assert self.input_ids.ndim == 1 and self.input_ids.shape == self.is_label.shape
        assert self.is_label.dtype == np.bool_
        # the first token has no context: nothing can predict it
        assert len(self.input_ids) > 0 and not self.is_label[0]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        return int(self.is_label.sum())


@dataclass(frozen=True)
class Row:
    """Whole documents that share a row. `index`, its position before shuffling, identifies it in messages."""

    index: int
    documents: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-step's rows, without padding. A token's label is at the position that predicts it."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, restart at each document
    cu_seqlens: torch.Tensor  # (D + 1,) int32, document boundaries in T
    max_seqlen: int  # tokens of the longest document
    label_positions: torch.Tensor  # (N,) int64 into T: the token before each learned token
    labels: torch.Tensor  # (N,) int64: the learned tokens
    row_indices: tuple[int, ...]
    lengths: tuple[int, ...]  # of the documents, on the host, so that per-document attention needs no device sync
    row_tokens: tuple[int, ...]  # tokens of each row

    def __post_init__(self) -> None:
        num_tokens = self.input_ids.shape[1]
        assert self.input_ids.shape == self.position_ids.shape == (1, num_tokens)
        assert sum(self.lengths) == sum(self.row_tokens) == num_tokens and max(self.lengths) == self.max_seqlen
        assert self.cu_seqlens.shape == (len(self.lengths) + 1,) and self.cu_seqlens.dtype == torch.int32
        assert self.labels.shape == self.label_positions.shape

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Batch:
        """Moves the tensors; from pinned memory the copies overlap with work on the device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "cu_seqlens", "label_positions", "labels")
        }
        return replace(self, **moved)

    def without_labels(self) -> Batch:
        """The same tokens without labels: pads a rank's share of a step that has too few rows."""
        empty = torch.empty(0, dtype=torch.int64)
        return replace(self, label_positions=empty, labels=empty)


def collate(examples: Sequence[Example], row_indices: Sequence[int], row_tokens: Sequence[int] | None = None) -> Batch:
    """Concatenates the documents of one micro-step (all of its rows, in order) into a batch; by default of one row."""
    lengths = tuple(len(example) for example in examples)
    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    is_label = np.concatenate([example.is_label for example in examples])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    position_ids = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)
    # never a document's first token, so learned - 1 is in the same document
    learned = np.flatnonzero(is_label)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(lengths),
        label_positions=torch.from_numpy(learned - 1),
        labels=torch.from_numpy(input_ids[learned]),
        row_indices=tuple(row_indices),
        lengths=lengths,
        row_tokens=(len(input_ids),) if row_tokens is None else tuple(row_tokens),
    )


# --- which documents share a row ---


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """All rows of a dataset as three arrays: 4 bytes per document and 16 per row, whatever their length."""

    documents: np.ndarray  # (D,) int32: every packed document exactly once, row after row
    offsets: np.ndarray  # (R + 1,) int64: row i is documents[offsets[i]:offsets[i + 1]]
    tokens: np.ndarray  # (R,) int64: tokens of each row
    row_tokens: int

    def __post_init__(self) -> None:
        assert self.offsets[0] == 0 and self.offsets[-1] == len(self.documents)
        assert len(self.tokens) == len(self) and (len(self) == 0 or self.tokens.max() <= self.row_tokens)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:  # int -> Row, slice -> list of Row
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return Row(index, tuple(self.documents[self.offsets[index] : self.offsets[index + 1]].tolist()))

    @property
    def efficiency(self) -> float:
        """Fraction of the rows' slots that hold a token."""
        return float(self.tokens.sum() / max(1, len(self) * self.row_tokens))

    def sum_by_row(self, values: np.ndarray) -> np.ndarray:
        """Sums a per-document value over each row, as int64."""
        if len(self) == 0:
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(values[self.documents].astype(np.int64), self.offsets[:-1])


def pack_best_fit(lengths: np.ndarray, row_tokens: int, seed: int) -> Rows:
    """Packs whole documents: a row starts with the longest one left, then takes the longest that still fits.

    (This is first-fit decreasing, built row by row.) Works on the histogram of lengths: until some length
    runs out, consecutive rows consist of the same lengths, so the loop runs once per *kind* of row, at most
    once per distinct length, not once per document. Documents of equal length are interchangeable; `seed`
    shuffles them, so that which of them share a row does not depend on file order. A pure function of its
    arguments.
    """
    _check_lengths(lengths, row_tokens)
    by_length, counts, first = _shuffled_by_length(lengths, row_tokens, seed)
    longest_up_to = np.maximum.accumulate(np.where(counts > 0, np.arange(row_tokens + 1), 0)).tolist()
    left = counts.tolist()
    taken = first.tolist()  # taken[n]: next unused document of length n in by_length
    documents: list[np.ndarray] = []
    row_sizes: list[np.ndarray] = []
    with track("packing document", len(lengths)) as task:
        while longest := _longest(longest_up_to, left, row_tokens):
            kind: list[tuple[int, int]] = []  # (length, how many of it), longest first
            space = row_tokens
            while space and longest:
                times = min(left[longest], space // longest)
                kind.append((longest, times))
                space -= times * longest
                longest = _longest(longest_up_to, left, min(space, longest - 1))
            repeats = min(left[length] // times for length, times in kind)
            columns = []
            for length, times in kind:
                begin, end = taken[length], taken[length] + repeats * times
                columns.append(by_length[begin:end].reshape(repeats, times))
                taken[length] = end
                left[length] -= repeats * times
            block = np.concatenate(columns, axis=1)
            documents.append(block.ravel())
            row_sizes.append(np.full(repeats, block.shape[1], dtype=np.int64))
            task.add(block.size)
    return _rows(documents, row_sizes, lengths, row_tokens)


def one_document_per_row(lengths: np.ndarray, row_tokens: int | None = None) -> Rows:
    """Rows of one document each, in file order (`packing: false`)."""
    longest = int(lengths.max(initial=1))
    _check_lengths(lengths, row_tokens or longest)
    documents = np.arange(len(lengths), dtype=np.int32)
    return _rows([documents], [np.ones(len(lengths), dtype=np.int64)], lengths, row_tokens or longest)


def hashed_order(count: int, *keys: int) -> np.ndarray:
    """A permutation of range(count) that depends on `keys` alone, not on numpy's version or the platform.

    Sorts by splitmix64 of (keys, i). Resuming with another numpy version must give the same rows, which
    numpy's own generators do not guarantee.
    """
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = _splitmix64(state ^ np.uint64(key & 0xFFFFFFFFFFFFFFFF))
    return np.argsort(_splitmix64(state + np.arange(count, dtype=np.uint64)), kind="stable")


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)  # uint64 arrays wrap around, as the algorithm expects
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled_by_length(lengths: np.ndarray, row_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents grouped by length, each group shuffled; the size of group n; where group n starts."""
    shuffled = hashed_order(len(lengths), seed).astype(np.int32)
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    counts = np.bincount(lengths, minlength=row_tokens + 1)
    return by_length, counts, np.cumsum(counts) - counts


def _longest(longest_up_to: list[int], left: list[int], limit: int) -> int:
    """Longest length <= limit that has documents left, 0 if there is none. Compresses the path as it goes."""
    found = longest_up_to[limit]
    while found and not left[found]:
        found = longest_up_to[found - 1]
    longest_up_to[limit] = found
    return found


def _check_lengths(lengths: np.ndarray, row_tokens: int) -> None:
    too_long = np.flatnonzero(lengths > row_tokens)
    if len(too_long):
        raise UserError(
            f"document {too_long[0]} has {lengths[too_long[0]]:,} tokens but data.row_tokens is "
            f"{row_tokens:,}; raise it or set data.on_long to truncate or drop"
        )
    assert len(lengths) == 0 or lengths.min() > 0


def _rows(documents: list[np.ndarray], row_sizes: list[np.ndarray], lengths: np.ndarray, row_tokens: int) -> Rows:
    order = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int32)
    sizes = np.concatenate(row_sizes) if row_sizes else np.zeros(0, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = np.diff(np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])[offsets])
    return Rows(documents=order, offsets=offsets, tokens=tokens, row_tokens=row_tokens)
