"""A run's numbers as a bounded number of points, from which no step is lost."""

import json
import random

import numpy as np
import pytest

from qlora_dist.config.run_dir import RunDir
from qlora_dist.pages import Curves, append_event, holds_run, read_curves, read_run
from qlora_dist.pages.curves import KEYS, LIMIT
from qlora_dist.pages.history import LONGEST_TEXT, read_history
from qlora_dist.pages.run_files import MAX_SAMPLE_TEXT, MAX_SAMPLES


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


def test_the_best_is_the_lowest_held_out_loss_and_the_earliest_of_equal_ones():
    for seed in range(30):
        rng = random.Random(seed)
        found = [(rng.choice([1.0, 1.5, 2.0, float("nan"), "3"]), step) for step in range(rng.randint(1, 9))]
        curves = Curves()
        for loss, step in found:
            curves.add_held_out(step, {"eval_loss": loss})
        losses = [(loss, step) for loss, step in found if loss in (1.0, 1.5, 2.0)]
        assert curves.best == (min(losses) if losses else None)


def test_a_folder_with_either_file_of_a_run_holds_one_and_samples_are_bounded(tmp_path):
    assert not holds_run(tmp_path)
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
        assert not holds_run(tmp_path) and holds_run(tmp_path / name)
    rows = [{"prompt": "p" * size, "after": "a" * size, "more": 1} for size in range(0, 3 * MAX_SAMPLE_TEXT, 100)]
    (tmp_path / "samples.json").write_text(json.dumps([3, {"after": "no prompt"}, *rows]))
    for folder in ("step-00000004", "step-00000012", "rejected-step-00000007", "abandoned-1", "aside-1", "step-x"):
        (tmp_path / "checkpoints" / folder).mkdir(parents=True)
    found = read_run(tmp_path, Curves())
    assert found.checkpoints == [4, 12] and found.set_aside == ["abandoned-1", "rejected-step-00000007"]
    assert len(found.samples) == MAX_SAMPLES and all(one.keys() == {"prompt", "after"} for one in found.samples)
    for one, row in zip(found.samples, rows):
        assert one["prompt"] == row["prompt"][:MAX_SAMPLE_TEXT] and one["after"] == row["after"][:MAX_SAMPLE_TEXT]


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
