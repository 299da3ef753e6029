"""Which documents of a store a run uses: held-out records, caps and weights. Pure functions of the seed.

A choice is made by sorting hashes of (seed, source, record), so it does not depend on the order of sources, on
workers, or on numpy's version. Changing a weight or the seed selects again; nothing is tokenized again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ...config import SourceConfig
from ...errors import UserError
from ..packing import hashed_order

_RECORDS, _FRACTION = 1, 2  # the purpose of a hash


def select_documents(
    sources: Sequence[SourceConfig],
    num_records: Sequence[int],
    source_of: np.ndarray,
    record_of: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Indices of the used documents, source after source; a document of weight 2 appears twice."""
    chosen = [np.zeros(0, dtype=np.int64)]
    for i, source in enumerate(sources):
        documents = np.flatnonzero(source_of == i)
        is_used = _used_records(source, num_records[i], seed)
        documents = documents[is_used[record_of[documents]]]
        times, fraction = divmod(source.weight, 1.0)
        chosen += [documents] * int(times)
        if fraction:
            order = hashed_order(len(documents), seed, _source_key(source), _FRACTION)
            chosen.append(np.sort(documents[order[: round(fraction * len(documents))]]))
    return np.concatenate(chosen)


def overlap_warning(evaluated: np.ndarray, trained: np.ndarray) -> str | None:
    """What to say if documents are evaluated that are also trained on. Both: hashes of documents, uint64."""
    both = int(np.isin(evaluated, trained).sum())
    return f"{both:,} of {len(evaluated):,} evaluation examples also occur in the training data" if both else None


def _used_records(source: SourceConfig, num_records: int, seed: int) -> np.ndarray:
    """(num_records,) bool."""
    order = hashed_order(num_records, seed, _source_key(source), _RECORDS)
    held_out = _num_held_out(source, num_records)
    if source.part == "held_out":
        order = order[:held_out]
    elif source.part == "train":
        order = order[held_out:]
    if source.shuffle and source.max_examples is not None and source.part != "held_out":
        order = order[: source.max_examples]
    is_used = np.zeros(num_records, dtype=np.bool_)
    is_used[order] = True
    return is_used


def _num_held_out(source: SourceConfig, num_records: int) -> int:
    if source.hold_out is None:
        return 0
    count = max(1, round(source.hold_out * num_records)) if source.hold_out < 1 else int(source.hold_out)
    if count >= num_records:
        raise UserError(
            f"data source {source.path}: hold_out {source.hold_out:g} of {num_records:,} records leaves none to "
            "train on; lower it"
        )
    return count


def _source_key(source: SourceConfig) -> int:
    name = f"{source.name}\n{source.subset}\n{source.split}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
