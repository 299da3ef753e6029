"""Which documents are used is drawn from (seed, name of the source, record), and sources draw independently."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config import SourceConfig
from qlora_dist.data.documents.select import select_documents

NUM_RECORDS = 60


def chosen(seed: int = 0, num_records: int = NUM_RECORDS, **changes: Any) -> list[int]:
    """The chosen documents of one source of one document per record."""
    source = SourceConfig(**{"path": "someone/set", **changes})
    numbers = np.arange(num_records)
    return select_documents([source], [num_records], np.zeros_like(numbers), numbers, seed).tolist()


DRAWN = {
    "held out": {"hold_out": 0.5, "part": "held_out"},
    "sample": {"max_examples": 30, "shuffle": True},
    "fraction": {"weight": 0.5},
}


@pytest.mark.parametrize("how", DRAWN.values(), ids=DRAWN)
def test_the_seed_and_each_part_of_a_sources_name_draw_other_records(how: dict[str, Any]) -> None:
    draws = [
        chosen(**how), chosen(**how, seed=1), chosen(**how, name="other"), chosen(**how, subset="s"),
        chosen(**how, split="test"),
    ]  # fmt: skip
    assert len({tuple(draw) for draw in draws}) == len(draws)
    for draw in draws:
        assert len(draw) == NUM_RECORDS // 2 and draw == sorted(draw) != list(range(NUM_RECORDS // 2))
    assert chosen(**how, path="moved/elsewhere", name="someone/set") == chosen(**how)


def test_sampling_and_holding_out_are_drawn_apart_from_a_fraction() -> None:
    """Else a fraction of what is trained on would be chosen by what is held out."""
    assert chosen(**DRAWN["fraction"]) != chosen(**DRAWN["sample"])


@given(st.integers(2, 80), st.one_of(st.floats(0.01, 0.49), st.integers(1, 40)), st.integers(0, 5))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_each_record_is_trained_on_or_held_out(num_records: int, hold_out: float, seed: int) -> None:
    hold_out = min(hold_out, num_records - 1)
    parts = [chosen(seed, num_records, hold_out=hold_out, part=part) for part in ("train", "held_out")]
    expected = max(1, round(hold_out * num_records)) if hold_out < 1 else int(hold_out)
    assert len(parts[1]) == expected and sorted([*parts[0], *parts[1]]) == list(range(num_records))


@given(st.floats(0.05, 3.9), st.integers(1, 50), st.integers(0, 5))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_weight_is_how_often_a_document_is_used(weight: float, num_records: int, seed: int) -> None:
    counts = np.bincount(chosen(seed, num_records, weight=weight), minlength=num_records)
    whole, fraction = divmod(weight, 1.0)
    assert set(counts.tolist()) <= {int(whole), int(whole) + 1}
    assert counts.sum() == int(whole) * num_records + round(fraction * num_records)
