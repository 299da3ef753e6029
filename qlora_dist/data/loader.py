"""Rows -> this rank's micro-batches. Step k is a pure function of (data, seed, k): a resume needs only k.

The rows of all epochs form one endless stream, epoch after epoch, each in its own seeded order. Step k takes
the next `rows_per_step` rows of it, whatever the number of ranks, and assigns them so that all ranks get the
same number of rows and nearly the same work. Ranks do not communicate: global numbers (labels and tokens of
the step) are computed from the document lengths, which every rank has.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import UserError
from .accumulation import derive_accumulation
from .packing import Batch, Example, Rows, collate, hashed_order

MAX_EXACT_STEPS = 16  # steps whose assignment to ranks `longest_batch` computes


class DocumentStore(Protocol):
    """What the loader needs from `data.documents.Documents`: lengths in memory, tokens on demand."""

    lengths: np.ndarray  # (D,) int32
    num_labels: np.ndarray  # (D,) int32

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class StepRows:
    """One rank's share of one optimizer step, with the numbers of the whole step."""

    microbatches: list[Batch]  # this rank's; the same number on every rank
    num_labels: int  # of the step, over all ranks
    num_tokens: int  # of the step, over all ranks, without filler
    epoch: float  # passes over the rows once this step is done
    row_indices: tuple[int, ...]  # of the step, over all ranks, in stream order
    imbalance: float  # the busiest rank's work divided by the mean over ranks


class Loader:
    """Assigns the rows of each step to the ranks. Keeps no position in the stream."""

    def __init__(
        self,
        documents: DocumentStore,
        rows: Rows,
        *,
        rows_per_step: int,
        micro_rows: int,
        rank: int,
        world_size: int,
        seed: int,
        total_rows: int | None = None,
    ) -> None:
        """`total_rows` (epochs * len(rows)) ends the stream; the last step may then be short."""
        if len(rows) == 0:
            raise UserError("no rows to train on: every source is empty or every example was dropped")
        self.accumulation = derive_accumulation(rows_per_step, micro_rows, world_size)
        self.documents = documents
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.micro_rows = micro_rows
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.total_rows = total_rows
        self._labels = rows.sum_by_row(documents.num_labels)
        self._costs = row_costs(rows, documents.lengths)
        self._shortest_row = int(np.argmin(rows.tokens))
        # a step may straddle two epochs
        self._epoch_order = lru_cache(maxsize=2)(lambda epoch: hashed_order(len(rows), seed, epoch))

    @property
    def num_steps(self) -> int | None:
        """Steps until the stream ends, None if it is endless."""
        return None if self.total_rows is None else -(-self.total_rows // self.rows_per_step)

    def rows_of_step(self, step: int) -> np.ndarray:
        """Row indices of 0-based optimizer step `step`, over all ranks, in stream order."""
        begin = step * self.rows_per_step
        end = begin + self.rows_per_step
        if self.total_rows is not None:
            if begin >= self.total_rows:
                raise IndexError(f"step {step} starts at row {begin}, but the data ends at row {self.total_rows}")
            end = min(end, self.total_rows)
        pieces = []
        while begin < end:
            epoch, offset = divmod(begin, len(self.rows))
            pieces.append(self._epoch_order(epoch)[offset : offset + end - begin])
            begin += len(pieces[-1])
        return np.concatenate(pieces)

    def step(self, step: int) -> StepRows:
        """This rank's micro-batches of 0-based optimizer step `step`."""
        indices = self.rows_of_step(step)
        costs = self._costs[indices]
        shares = balance_over_ranks(costs, self.world_size)
        work = [costs[share].sum() for share in shares]
        return StepRows(
            microbatches=self._microbatches(indices[shares[self.rank]]),
            num_labels=int(self._labels[indices].sum()),
            num_tokens=int(self.rows.tokens[indices].sum()),
            epoch=(step * self.rows_per_step + len(indices)) / len(self.rows),
            row_indices=tuple(indices.tolist()),
            imbalance=float(max(work) * len(work) / sum(work)),
        )

    def longest_batch(self, start: int, stop: int) -> Batch:
        """The micro-batch with the most tokens on any rank in steps start..stop-1; the same on every rank.

        Examines the steps whose `micro_rows` longest rows have the most tokens. With one rank, or one row per
        micro-batch, the first of them contains it.
        """
        tokens, micro = self.rows.tokens, self.micro_rows
        bounds = [int(np.sort(tokens[self.rows_of_step(step)])[-micro:].sum()) for step in range(start, stop)]
        best: tuple[int, int, list[int]] = (-1, -1, [])
        for offset in np.argsort(-np.array(bounds), kind="stable")[:MAX_EXACT_STEPS].tolist():
            if bounds[offset] <= best[0]:
                break
            indices = self.rows_of_step(start + offset)
            for share in balance_over_ranks(self._costs[indices], self.world_size):
                for begin in range(0, len(share), micro):
                    rows = indices[share[begin : begin + micro]]
                    best = max(best, (int(tokens[rows].sum()), int(self._costs[rows].sum()), rows.tolist()))
        return _batch(self.documents, self.rows, best[2])

    def iterate(self, start: int, stop: int, pin_memory: bool = False) -> Iterator[StepRows]:
        """Steps start..stop-1; a thread prepares the next one while the caller works on the current one.

        An error in the thread is re-raised here. Leaving the loop early (break, exception, `close()`) stops it.
        """

        def prepare(step: int) -> StepRows:
            rows = self.step(step)
            return replace(rows, microbatches=[_pinned(b) for b in rows.microbatches]) if pin_memory else rows

        return _prefetch(prepare, range(start, stop))

    def _microbatches(self, indices: np.ndarray) -> list[Batch]:
        return _to_batches(self.documents, self.rows, indices, self.micro_rows, self.accumulation, self._shortest_row)


def draw_rows(num_rows: int, at_most: int | Literal["all"], seed: int) -> np.ndarray:
    """Indices of the rows that are evaluated, in order; the same on every number of ranks."""
    return np.sort(hashed_order(num_rows, seed)[: None if at_most == "all" else at_most])


def eval_batches(
    documents: DocumentStore,
    rows: Rows,
    micro_rows: int,
    rank: int,
    world_size: int,
    chosen: np.ndarray | None = None,  # indices of rows; all rows without it
) -> list[Batch]:
    """This rank's share of the rows, once. Every rank gets the same number of batches; filler has no labels."""
    if len(rows) == 0:
        raise UserError("no rows to evaluate on: every source is empty or every example was dropped")
    chosen = np.arange(len(rows)) if chosen is None else chosen
    num_batches = -(-len(chosen) // (micro_rows * world_size))
    mine = chosen[rank::world_size]
    return _to_batches(documents, rows, mine, micro_rows, num_batches, int(np.argmin(rows.tokens)))


def row_costs(rows: Rows, lengths: np.ndarray) -> np.ndarray:
    """Work of each row: a term per token plus the square of each document's length (attention is per document).

    A token counts as much as its attention to a full row. By FLOPs it should count more (12 hidden sizes), but then
    the few empty slots of packed rows would outweigh all differences in attention; with this weight, both the tokens
    and the attention of the ranks come out nearly equal, packed or not.
    """
    return rows.sum_by_row(lengths.astype(np.int64) ** 2) + rows.row_tokens * rows.tokens


def balance_over_ranks(costs: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Assigns positions of `costs` to ranks: equal counts (or one apart), sums as equal as a fast heuristic gets them.

    Longest processing time first with a limit on the count, then swaps between the busiest rank and the others
    for as long as they lower its sum. Deterministic. Each rank's share is ordered by decreasing cost, so that the
    ranks' micro-steps match as well: where weights are gathered, all ranks wait for the slowest in each of them.
    """
    order = np.argsort(-costs, kind="stable")
    base, extra = divmod(len(costs), num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = [0] * num_ranks
    for position in order.tolist():
        num_full = sum(len(share) > base for share in shares)
        open_ranks = [
            rank
            for rank in range(num_ranks)
            if len(shares[rank]) < base or (len(shares[rank]) == base and num_full < extra)
        ]
        rank = min(open_ranks, key=lambda r: (sums[r], r))
        shares[rank].append(position)
        sums[rank] += int(costs[position])
    for _ in range(len(costs)):
        if not _swap_with_busiest(costs, shares, sums):
            break
    return [np.array(sorted(share, key=lambda p: (-costs[p], p)), dtype=np.int64) for share in shares]


def _swap_with_busiest(costs: np.ndarray, shares: list[list[int]], sums: list[int]) -> bool:
    """Makes the swap with the busiest rank that most lowers the larger of the two sums. False if none does."""
    busiest = max(range(len(sums)), key=lambda r: (sums[r], -r))
    mine = costs[shares[busiest]]
    best: tuple[int, int, Any, Any] | None = None
    for other in range(len(sums)):
        if other == busiest or not shares[other] or not shares[busiest]:
            continue
        moved = mine[:, None] - costs[shares[other]][None, :]  # cost that a swap moves off the busiest rank
        after = np.maximum(sums[busiest] - moved, sums[other] + moved)
        i, j = np.unravel_index(int(np.argmin(after)), after.shape)
        if after[i, j] < sums[busiest] and (best is None or after[i, j] < best[0]):
            best = (int(after[i, j]), other, i, j)
    if best is None:
        return False
    _, other, i, j = best
    given_up, received = shares[busiest][i], shares[other][j]
    shares[busiest][i], shares[other][j] = received, given_up
    difference = int(costs[given_up] - costs[received])
    sums[busiest] -= difference
    sums[other] += difference
    return True


def _to_batches(
    documents: DocumentStore, rows: Rows, indices: np.ndarray, micro_rows: int, num_batches: int, filler: int
) -> list[Batch]:
    """Exactly `num_batches` batches: the rows, then as much filler without labels as needed."""
    batches = [
        _batch(documents, rows, indices[begin : begin + micro_rows].tolist())
        for begin in range(0, len(indices), micro_rows)
    ]
    assert len(batches) <= num_batches
    if len(batches) < num_batches:
        batches += [_batch(documents, rows, [filler]).without_labels()] * (num_batches - len(batches))
    return batches


def _batch(documents: DocumentStore, rows: Rows, row_indices: Sequence[int]) -> Batch:
    examples = [documents[d] for row in row_indices for d in rows[row].documents]
    return collate(examples, row_indices, rows.tokens[list(row_indices)].tolist())


def _pinned(batch: Batch) -> Batch:
    names = ("input_ids", "position_ids", "cu_seqlens", "label_positions", "labels")
    return replace(batch, **{name: getattr(batch, name).pin_memory() for name in names})


def _prefetch(prepare: Callable[[int], StepRows], steps: range) -> Iterator[StepRows]:
    """Yields prepare(step) for each step, prefetching one. The thread lives as long as this generator."""
    ready: queue.Queue[StepRows | BaseException] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(item: StepRows | BaseException) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for step in steps:
                if not put(prepare(step)):
                    return
        except BaseException as error:  # re-raised in the consumer
            put(error)

    thread = threading.Thread(target=work, name="prefetch rows", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
