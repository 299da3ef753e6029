"""A run's numbers as a bounded number of points, from which no step is lost."""

import json
import random

import numpy as np
import pytest

from qlora_dist.config.run_dir import RunDir
from qlora_dist.pages import Curves, append_event, read_curves
from qlora_dist.pages.curves import KEYS, LIMIT
from qlora_dist.pages.history import LONGEST_TEXT, read_history


def lines(number, **more):
    rng = random.Random(1)
    return [
        {"step": step, "loss": rng.random(), "tokens": 10, "step_seconds": 1.5, "data_seconds": 0.5, **more}
        for step in range(1, number + 1)
    ]


@pytest.mark.parametrize("number", [1, LIMIT, LIMIT + 1, 10_000])
def test_points_are_few_and_each_has_the_mean_and_the_extremes_of_its_steps(number):
    given = lines(number)
    given[number // 2]["loss"] = 50.0  # one bad step
    found = Curves(given).steps.to_json(KEYS)
    width = found["width"]
    assert len(found["step"]) <= LIMIT and width == max(1, 2 ** int(np.ceil(np.log2(number / LIMIT))))
    groups = [[line["loss"] for line in given[i : i + width]] for i in range(0, number, width)]
    assert found["loss"]["mean"] == pytest.approx([np.mean(group) for group in groups], rel=1e-4)
    if width > 1:
        assert found["loss"]["low"] == pytest.approx([min(group) for group in groups], rel=1e-4)
        assert found["loss"]["high"] == pytest.approx([max(group) for group in groups], rel=1e-4)
    assert max(found["loss"].get("high", found["loss"]["mean"])) == 50.0
    assert found["step"][-1] == number and found["tokens"][-1] == 10 * number and found["seconds"][-1] == 2.0 * number


def test_values_that_are_absent_or_no_finite_number_leave_a_gap():
    given = lines(3)
    given[0] |= {"loss": float("nan"), "lr": None}
    given[1] |= {"loss": "2", "lr": True}
    given[2] |= {"loss": 7.0}
    found = Curves(given).steps.to_json(KEYS)
    assert found["loss"]["mean"] == [None, None, 7.0] and "lr" not in found and "grad_norm" not in found


def test_held_out_losses_keep_their_steps_and_the_lowest_is_known(tmp_path):
    given = lines(9)
    given[3]["eval_loss"], given[8]["eval_loss"] = 1.25, 1.5
    (tmp_path / "eval_start.json").write_text('{"eval_loss": 3.0}')
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    curves = read_curves(RunDir(tmp_path))
    found = curves.held_out.to_json(("eval_loss",))
    assert found["step"] == [0, 4, 9] and found["eval_loss"]["mean"] == [3.0, 1.25, 1.5]
    assert found["tokens"] == [0, 40, 90] and curves.best == (1.25, 4)


def test_events_stand_alone_on_their_lines_after_one_that_was_cut_short(tmp_path):
    path = tmp_path / "history.jsonl"
    append_event(path, "start", step=0)
    with open(path, "a") as file:
        file.write('{"event": "end", "st')
    append_event(path, "start", step=4, said="x" * 2 * LONGEST_TEXT)
    with open(path, "a") as file:
        file.write('[1]\n{"event": "other"}\n')
    found = read_history(path)
    assert [(event["event"], event["step"]) for event in found] == [("start", 0), ("start", 4)]
    assert found[1]["said"] == "x" * LONGEST_TEXT and found[0]["time"] <= found[1]["time"]
    assert read_history(tmp_path / "absent") == []
