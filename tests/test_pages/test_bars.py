"""Bars: shares of one width, whatever their values; rows of the plan; rows of what differs."""

import random
from types import SimpleNamespace

import pytest

from qlora_dist.pages import Bar, BarChart
from qlora_dist.pages.report import _differences, _plan_rows


@pytest.mark.parametrize("largest", [None, 400.0])
@pytest.mark.parametrize("seed", range(20))
def test_all_bars_have_one_scale_and_their_text_stands_behind_part_and_whisker(seed, largest):
    rng = random.Random(seed)
    bars = []
    for number in range(rng.randint(1, 6)):
        parts = tuple(rng.choice([0.0, rng.uniform(0, 60)]) for _ in range(rng.randint(1, 4)))
        total = sum(parts)
        low, high = sorted((rng.uniform(0, total), total + rng.uniform(-0.5, 0.5) * total))
        spread = (low, high) if rng.random() < 0.5 else (None, None)
        bars.append(Bar(f"bar {number}", parts, "text", *spread))
    ends = [max(sum(bar.parts), bar.high or 0.0) for bar in bars]
    width = largest or max(ends) or 1.0
    rows = BarChart("title", "unit", bars, largest=largest).rows
    assert [row["label"] for row in rows] == [bar.label for bar in bars]
    for bar, end, row in zip(bars, ends, rows, strict=True):
        assert row["parts"] == pytest.approx([100 * part / width for part in bar.parts], abs=0.006)
        assert sum(row["parts"]) + row["gap"] == pytest.approx(100 * end / width, abs=0.03)
        if bar.low is None:
            assert row["whisker"] is None
        else:
            left, length = row["whisker"]
            assert (left, left + length) == pytest.approx((100 * bar.low / width, 100 * bar.high / width), abs=0.02)
    if largest is None and any(ends):
        assert max(sum(row["parts"]) + row["gap"] for row in rows) == pytest.approx(100, abs=0.03)


def test_nothing_to_show_is_no_error():
    assert BarChart("title", "unit", []).rows == []
    (row,) = BarChart("title", "unit", [Bar("none", (0.0,), "0")]).rows
    assert row["parts"] == [0.0] and row["gap"] == 0.0


def test_the_largest_item_of_a_plan_comes_first_and_what_differs_is_no_name_of_a_folder():
    for seed in range(20):
        rng = random.Random(seed)
        sizes = {f"item {number}": rng.randint(0, 10**6) for number in range(rng.randint(0, 9))}
        order = sorted((name for name, size in sizes.items() if size), key=lambda name, sizes=sizes: -sizes[name])
        found = [name for name, _, _ in _plan_rows({"plan": {"items": sizes}})]
        assert found == order or [sizes[name] for name in found] == [sizes[name] for name in order]
        leaves = [{"run_dir": f"runs/{run}", **{key: rng.randint(0, 1) for key in "abcd"}} for run in range(3)]
        differ = [key for key in "abcd" if len({one[key] for one in leaves}) > 1]
        runs = [SimpleNamespace(leaves=lambda one=one: one) for one in leaves]
        assert [key for key, _ in _differences(runs)] == differ
