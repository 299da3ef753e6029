"""A step is a function of its number; it is divided over ranks without losing, duplicating or unbalancing rows."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import alpaca_like_lengths

from qlora_dist.data.accumulation import derive_accumulation
from qlora_dist.data.loader import (
    Loader,
    balance_over_ranks,
    draw_rows,
    eval_batches,
    row_costs,
)
from qlora_dist.data.packing import Example, one_document_per_row, pack_best_fit
from qlora_dist.errors import UserError


class FakeDocuments:
    """Documents whose tokens identify them: token = 100 * document + position."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, dtype=np.int32)
        self.num_labels = self.lengths // 2

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        length = int(self.lengths[index])
        is_label = np.zeros(length, dtype=np.bool_)
        is_label[length - int(self.num_labels[index]) :] = True
        return Example(np.arange(length, dtype=np.int32) + 100 * index, is_label)


def loaders(world_size, *, num_documents=23, rows_per_step=8, micro_rows=1, total_rows=None, seed=0, packed=True):
    documents = FakeDocuments(np.random.default_rng(1).integers(2, 40, num_documents))
    rows = pack_best_fit(documents.lengths, 64, seed) if packed else one_document_per_row(documents.lengths, 64)
    return [
        Loader(
            documents,
            rows,
            rows_per_step=rows_per_step,
            micro_rows=micro_rows,
            rank=rank,
            world_size=world_size,
            seed=seed,
            total_rows=total_rows,
        )
        for rank in range(world_size)
    ]


def labelled_rows(steps):
    """Row indices of all batches with labels, over all ranks."""
    return sorted(row for step in steps for batch in step.microbatches if batch.num_labels for row in batch.row_indices)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_rows", [1, 2])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_every_row_of_a_step_is_on_exactly_one_rank_for_any_world_size(world_size, micro_rows, step):
    (reference,) = loaders(1)
    shares = [loader.step(step) for loader in loaders(world_size, micro_rows=micro_rows)]
    assert labelled_rows(shares) == sorted(reference.step(step).row_indices)
    for share in shares:
        assert len(share.microbatches) == 8 // (world_size * micro_rows)
        assert share.row_indices == reference.step(step).row_indices
        assert share.num_labels == sum(b.num_labels for s in shares for b in s.microbatches)
        assert share.num_tokens == sum(b.num_tokens for s in shares for b in s.microbatches)


def test_every_epoch_of_the_stream_contains_every_row_once_in_a_different_order():
    (loader,) = loaders(1, rows_per_step=3)
    stream = [row for step in range(20) for row in loader.step(step).row_indices]
    n = len(loader.rows)
    epochs = [stream[i * n : (i + 1) * n] for i in range(len(stream) // n)]
    assert len(epochs) > 2 and n % 3
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert epochs[0] != epochs[1]


@given(st.integers(0, 40), st.integers(0, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_step_depends_only_on_its_number_and_the_seed(step, seed):
    (loader,) = loaders(1, seed=seed)
    (fresh,) = loaders(1, seed=seed)
    loader.step(3)  # a loader that has done something else first
    assert loader.step(step).row_indices == fresh.step(step).row_indices
    assert torch.equal(loader.step(step).microbatches[0].input_ids, fresh.step(step).microbatches[0].input_ids)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_short_last_step_gets_filler_without_labels_so_that_ranks_stay_in_sync(world_size):
    shares = [loader.step(1) for loader in loaders(world_size, total_rows=11)]
    assert len(shares[0].row_indices) == 3
    assert labelled_rows(shares) == sorted(shares[0].row_indices)
    assert {len(share.microbatches) for share in shares} == {8 // world_size}
    assert sum(b.num_labels for s in shares for b in s.microbatches) == shares[0].num_labels
    assert shares[0].epoch == 11 / len(loaders(1)[0].rows)
    fillers = [b for s in shares for b in s.microbatches if not b.num_labels]
    assert len(fillers) == 5 and all(b.num_tokens for b in fillers)


def test_the_end_of_the_data_is_known():
    (loader,) = loaders(1, total_rows=11)
    assert loader.num_steps == 2 and loaders(1)[0].num_steps is None
    with pytest.raises(IndexError, match="step 2 starts at row 16, but the data ends at row 11"):
        loader.step(2)


@pytest.mark.parametrize(("world_size", "rows_per_step"), [(2, 16), (4, 64), (8, 128)])
def test_the_ranks_attention_differs_by_less_than_five_percent(world_size, rows_per_step):
    documents = FakeDocuments(alpaca_like_lengths(60_000))
    rows = pack_best_fit(documents.lengths, 2048, seed=0)
    squares = rows.sum_by_row(documents.lengths.astype(np.int64) ** 2)
    costs = row_costs(rows, documents.lengths)
    loader = Loader(documents, rows, rows_per_step=rows_per_step, micro_rows=1, rank=0, world_size=world_size, seed=0)

    def spread(values, shares):
        sums = np.array([values[share].sum() for share in shares])
        return sums.max() / sums.min() - 1

    attention, work, round_robin = [], [], []
    for step in range(24):
        indices = loader.rows_of_step(step)
        shares = balance_over_ranks(costs[indices], world_size)
        attention.append(spread(squares[indices], shares))
        # all FLOPs of a 7B model: see row_costs
        work.append(spread(squares[indices] + 12 * 4096 * rows.tokens[indices], shares))
        dealt = [np.arange(len(indices))[rank::world_size] for rank in range(world_size)]
        round_robin.append(spread(squares[indices], dealt))
    # the one short row of a dataset, or one huge document, can outweigh a whole share: then no assignment is even
    assert np.median(attention) < 0.05 and np.quantile(attention, 0.9) < 0.05
    assert max(work) < 0.05
    assert np.median(round_robin) > 0.05  # not automatic: round-robin in stream order differs by more


def heavy_tailed_lengths(num_documents, row_tokens):
    """Pareto with exponent 1.2, like scraped text: half of the documents below 110 tokens, 1 in 100 above 2,500."""
    draws = 60 * (1 + np.random.default_rng(1).pareto(1.2, num_documents))
    return np.clip(draws, 8, row_tokens).astype(np.int64)


@pytest.mark.parametrize("world_size", [8, 16])
@pytest.mark.parametrize("row_tokens", [4096, 16384])
@pytest.mark.parametrize("rows_per_rank", [4, 8])
def test_with_heavy_tails_no_other_assignment_would_be_much_better(world_size, row_tokens, rows_per_rank):
    documents = FakeDocuments(heavy_tailed_lengths(60_000, row_tokens))
    rows = pack_best_fit(documents.lengths, row_tokens, seed=0)
    squares = rows.sum_by_row(documents.lengths.astype(np.int64) ** 2)
    costs = row_costs(rows, documents.lengths)
    rows_per_step = world_size * rows_per_rank
    loader = Loader(documents, rows, rows_per_step=rows_per_step, micro_rows=1, rank=0, world_size=world_size, seed=0)
    over_bound, spread, idle, idle_round_robin = [], [], [], []
    for step in range(min(24, len(rows) // rows_per_step)):
        indices = loader.rows_of_step(step)
        step_costs, shares = costs[indices], balance_over_ranks(costs[indices], world_size)
        ordered = np.sort(step_costs)
        # no busiest rank can be below the mean, nor below the most expensive row together with the cheapest ones
        bound = max(step_costs.sum() / world_size, ordered[-1] + ordered[: rows_per_rank - 1].sum())
        over_bound.append(max(step_costs[share].sum() for share in shares) / bound - 1)
        attention = np.array([squares[indices][share].sum() for share in shares])
        if squares[indices].max() < 0.8 * attention.mean():
            spread.append(attention.max() / attention.min() - 1)
        # FLOPs of a 7B model (see row_costs): how long the others wait for the busiest rank
        work = squares[indices] + 12 * 4096 * rows.tokens[indices]
        round_robin = [np.arange(len(indices))[rank::world_size] for rank in range(world_size)]
        for waits, assignment in ((idle, shares), (idle_round_robin, round_robin)):
            sums = np.array([work[share].sum() for share in assignment])
            waits.append(sums.max() / sums.mean() - 1)
    assert np.median(over_bound) < 0.01 and max(over_bound) < 0.10
    # where no row weighs as much as a share and a rank has rows to choose from, the ranks' attention is even
    if rows_per_rank == 8:
        assert len(spread) >= 2 and np.median(spread) < 0.05
    assert np.median(idle_round_robin) > 0.01 and np.median(idle) < 0.4 * np.median(idle_round_robin)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_balancing_keeps_every_row_and_equal_counts(costs, num_ranks):
    costs = np.array(costs)
    shares = balance_over_ranks(costs, num_ranks)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(costs)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for share in shares:
        assert (np.diff(costs[share]) <= 0).all()


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_row_once_and_ranks_get_the_same_number_of_batches(world_size):
    documents = FakeDocuments(np.random.default_rng(1).integers(2, 40, 23))
    rows = pack_best_fit(documents.lengths, 64, 0)
    shares = [eval_batches(documents, rows, 2, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    seen = sorted(row for share in shares for batch in share if batch.num_labels for row in batch.row_indices)
    assert seen == list(range(len(rows)))
    assert sum(b.num_labels for share in shares for b in share) == documents.num_labels.sum()


@pytest.mark.parametrize("at_most", [1, 5, 23, 100, "all"])
def test_every_number_of_ranks_evaluates_the_same_drawn_rows(at_most):
    documents = FakeDocuments(np.full(23, 40))  # one to a row
    rows = pack_best_fit(documents.lengths, 64, 0)
    drawn = draw_rows(len(rows), at_most, seed=7)
    assert len(drawn) == (23 if at_most == "all" else min(at_most, 23))
    for world_size in (1, 2, 4):
        shares = [eval_batches(documents, rows, 2, rank, world_size, drawn) for rank in range(world_size)]
        assert {len(share) for share in shares} == {-(-len(drawn) // (2 * world_size))}
        seen = sorted(row for share in shares for batch in share if batch.num_labels for row in batch.row_indices)
        assert seen == drawn.tolist()


def test_the_seed_draws_the_rows_and_they_are_no_prefix():
    first, same, other = (draw_rows(1000, 100, seed).tolist() for seed in (0, 0, 1))
    assert first == same != other
    assert len(set(first)) == 100 and max(first) > 800


def test_accumulation_follows_from_the_batch_and_an_invalid_row_count_is_rejected_with_the_nearest_valid_ones():
    assert derive_accumulation(16, 2, 4) == 2
    with pytest.raises(UserError, match=r"rows_per_step is 10.*micro_rows 2 x 4 ranks = 8.*: 8 or 16"):
        derive_accumulation(10, 2, 4)
    with pytest.raises(UserError, match=r"nearest multiples: 8$"):
        derive_accumulation(3, 2, 4)


def test_no_rows_are_an_error():
    empty = one_document_per_row(np.zeros(0, dtype=np.int32), 8)
    with pytest.raises(UserError, match="no rows to train on"):
        Loader(FakeDocuments([]), empty, rows_per_step=1, micro_rows=1, rank=0, world_size=1, seed=0)
    with pytest.raises(UserError, match="no rows to evaluate on"):
        eval_batches(FakeDocuments([]), empty, 1, 0, 1)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch rows"]


def test_iterating_gives_the_same_steps_as_calling_step():
    (loader,) = loaders(1)
    assert [s.row_indices for s in loader.iterate(2, 6)] == [loader.step(k).row_indices for k in range(2, 6)]
    assert not prefetch_threads()
    assert list(loader.iterate(3, 3)) == []


def test_the_next_step_is_prepared_while_the_caller_works():
    (loader,) = loaders(1)
    prepared = []
    original = loader.step
    loader.step = lambda k: prepared.append(k) or original(k)
    steps = loader.iterate(0, 10)
    next(steps)
    deadline = time.monotonic() + 5
    while len(prepared) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 2 <= len(prepared) <= 3
    steps.close()
    assert not prefetch_threads()


def test_an_error_while_preparing_reaches_the_caller_and_the_thread_ends():
    (loader,) = loaders(1, total_rows=11)
    steps = loader.iterate(0, 5)
    assert [next(steps).row_indices, next(steps).row_indices]
    with pytest.raises(IndexError, match="the data ends"):
        next(steps)
    assert not prefetch_threads()


def test_leaving_the_loop_early_stops_the_thread():
    (loader,) = loaders(1)
    for _ in loader.iterate(0, 100):
        break
    import gc

    gc.collect()
    assert not prefetch_threads()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_rows", [1, 2])
def test_the_longest_batch_is_the_longest_of_the_remaining_steps_on_any_rank(world_size, micro_rows):
    every = loaders(world_size, micro_rows=micro_rows, num_documents=80, packed=False)
    for start, stop in ((0, 10), (3, 7)):
        found = {loader.longest_batch(start, stop).row_indices for loader in every}
        (rows,) = found  # the same on every rank
        sizes = {
            batch.row_indices: batch.num_tokens
            for step in range(start, stop)
            for loader in every
            for batch in loader.step(step).microbatches
        }
        assert len(set(sizes.values())) > 3
        assert rows in sizes and sizes[rows] == max(sizes.values())


@given(
    st.lists(st.one_of(st.integers(2, 99), st.sampled_from([2, 80, 99])), min_size=12, max_size=48),
    st.sampled_from([(2, 1), (2, 2), (3, 2)]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_longest_batch_is_found_however_the_rows_of_the_steps_are_balanced(lengths, ranks_and_micro_rows):
    """The step whose longest rows are longest need not have it: its ranks may get one long row each."""
    world_size, micro_rows = ranks_and_micro_rows
    documents = FakeDocuments(lengths)
    settings_of_all = {"rows_per_step": 2 * world_size * micro_rows, "micro_rows": micro_rows, "seed": 0}
    every = [
        Loader(documents, one_document_per_row(documents.lengths, 100), **settings_of_all, rank=rank,
               world_size=world_size)
        for rank in range(world_size)
    ]  # fmt: skip
    steps = range(min(16, len(lengths) // (2 * world_size * micro_rows)) or 1)  # so many are looked at exactly
    longest = max(batch.num_tokens for step in steps for loader in every for batch in loader.step(step).microbatches)
    assert every[0].longest_batch(0, len(steps)).num_tokens == longest
