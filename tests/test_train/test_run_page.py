"""A run draws its page while it goes on, records its starts and ends, and never ends because of that."""

import contextlib
import itertools
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers.tiny_run import changed, config_of

import qlora_dist.train as trainer
from qlora_dist.config.run_dir import RunDir
from qlora_dist.errors import RunFailed
from qlora_dist.pages import Curves, read_curves, read_run, write_report
from qlora_dist.pages.history import read_history
from qlora_dist.train import run_page, train


@pytest.fixture
def watched(inputs, raw):
    """A run that evaluates after steps 2, 4, 5 and saves after 3, 5."""
    held_out = [{"path": inputs["data"]["train"][0]["path"].replace("train.json", "held_out.json")}]
    return changed(raw, train__steps=5, train__eval_every=2, train__save_every=3, data__eval=held_out)


def _run_dir(raw):
    return RunDir(Path(raw["run_dir"]))


def _without_times(page):
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+", "", page)


def test_the_page_is_drawn_at_each_evaluation_and_save_and_can_be_made_again(watched, monkeypatch):
    drawn = []

    def record(runs, file, **options):
        write_report(runs, file, **options)
        (run,) = runs
        last = run.curves.last
        drawn.append((int(last.get("step", 0)), "eval_loss" in last, run.checkpoints))
        assert file.name == "report.html" and "</html>" in file.read_text()

    monkeypatch.setattr(run_page, "write_report", record)
    train(config_of(watched))
    assert [step for step, _ in itertools.groupby(step for step, _, _ in drawn)] == [0, 2, 3, 4, 5]
    assert drawn[0] == (0, False, []) and drawn[1] == (0, True, [])  # at the start, and with its held-out loss
    assert drawn[-1][2] == [3, 5]

    run = _run_dir(watched)
    start, end = read_history(run.history)
    assert (start["step"], start["num_steps"], start["world_size"], start["device_type"]) == (0, 5, 1, "cpu")
    assert start["plan"]["peak_bytes"] > 0 and "4 rows of" in start["said"] and "base:" in start["said"]
    assert (end["step"], end["kind"]) == (5, "finished")
    page = run.report.read_text()
    run.report.unlink()
    write_report([read_run(run.path)], run.report)
    assert _without_times(run.report.read_text()) == _without_times(page)


def test_a_stopped_run_and_its_resume_are_two_starts_on_one_page(watched, monkeypatch):
    steps = trainer.train_step

    def stopping(*arguments, **options):
        if options["step"] == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            options["stop_requested"] = True
        return steps(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", stopping)
    train(config_of(watched))
    run = _run_dir(watched)
    assert "stopped: by SIGUSR1" in run.report.read_text()
    monkeypatch.setattr(trainer, "train_step", steps)
    train(config_of(watched))
    events = read_history(run.history)
    assert [(event["event"], event.get("kind"), event["step"]) for event in events] == [
        ("start", None, 0), ("end", "stopped", 3), ("start", None, 3), ("end", "finished", 5),
    ]  # fmt: skip
    assert "resuming from" in events[2]["said"]
    assert '"restarts": [3]' in run.report.read_text()


def test_the_end_of_a_run_that_fails_is_on_its_page(watched, monkeypatch):
    steps = trainer.train_step

    def failing(*arguments, **options):
        if options["step"] == 3:
            raise RunFailed("the loss is <b>not</b> finite")
        return steps(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", failing)
    with pytest.raises(RunFailed):
        train(config_of(watched))
    run = _run_dir(watched)
    assert read_history(run.history)[-1]["text"] == "the loss is <b>not</b> finite"
    assert "failed: the loss is &lt;b&gt;not&lt;/b&gt; finite" in run.report.read_text()


@pytest.mark.parametrize("ends_by", ["finished", "stopped", "failed"])
def test_the_last_words_of_a_start_are_written_before_another_may_begin(raw, monkeypatch, ends_by):
    run, held = _run_dir(raw), []
    steps, append, write = trainer.train_step, run_page.append_event, write_report

    def ending(*arguments, **options):
        if options["step"] == 2 and ends_by == "stopped":
            os.kill(os.getpid(), signal.SIGUSR1)
            options["stop_requested"] = True
        if options["step"] == 2 and ends_by == "failed":
            raise RunFailed("as wanted")
        return steps(*arguments, **options)

    def appending(path, event, **values):
        held.append((event, values.get("kind"), run.lock.exists()))
        append(path, event, **values)

    def writing(*arguments, **options):
        held.append(("page", None, run.lock.exists()))
        write(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", ending)
    monkeypatch.setattr(run_page, "append_event", appending)
    monkeypatch.setattr(run_page, "write_report", writing)
    with pytest.raises(RunFailed) if ends_by == "failed" else contextlib.nullcontext():
        train(config_of(raw, train__steps=4))
    assert ("end", ends_by, True) in held and held[-1] == ("page", None, True)
    assert all(is_held for *_, is_held in held)
    assert not run.lock.exists()
    assert "as wanted" in run.log.read_text() if ends_by == "failed" else True


@pytest.mark.parametrize("what", ["a folder in its place", "a disk that is full", "a mistake in the template"])
def test_a_page_that_cannot_be_written_is_said_once_and_ends_nothing(watched, monkeypatch, caplog, what):
    run = _run_dir(watched)
    if what == "a folder in its place":
        begin = RunDir.begin
        monkeypatch.setattr(RunDir, "begin", lambda self: (begin(self), run.report.mkdir()))
    else:
        error = OSError(28, "No space left on device") if what == "a disk that is full" else KeyError("template")

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(run_page, "write_report", fail)
        monkeypatch.setattr(run_page, "append_event", fail)
    with caplog.at_level(logging.WARNING, logger="qlora_dist"):
        assert train(config_of(watched)).step == 5
    assert run.completed.exists() and run.summary.exists()
    (warning,) = [record.getMessage() for record in caplog.records if "report.html" in record.getMessage()]
    assert "cannot be written" in warning and f"qlora-dist report {run.path}" in warning
    if what == "a folder in its place":
        shutil.rmtree(run.report)
    write_report([read_run(run.path)], run.report)
    assert "step</dt><dd>5" in run.report.read_text()


def test_nothing_is_written_where_the_directory_was_replaced(watched, monkeypatch):
    steps = trainer.train_step
    run = _run_dir(watched)

    def replacing(*arguments, **options):
        if options["step"] == 1:
            shutil.rmtree(run.path)
            run.path.mkdir()
        return steps(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", replacing)
    with pytest.raises(RunFailed, match="was removed or replaced"):
        train(config_of(watched))
    assert not run.report.exists() and not run.history.exists()


def test_curves_of_a_run_are_those_of_its_file(watched, monkeypatch):
    """Points that were added while it ran, and those of the lines that it left: also after a resume."""
    made = []
    monkeypatch.setattr(run_page, "read_curves", lambda run: made.append(read_curves(run)) or made[-1])
    train(config_of(watched))
    again = read_curves(_run_dir(watched))
    keys = ("loss", "lr", "imbalance")
    assert isinstance(made[0], Curves) and made[0].steps.to_json(keys) == again.steps.to_json(keys)
    assert made[0].held_out.to_json(("eval_loss",)) == again.held_out.to_json(("eval_loss",))
    assert again.held_out.to_json(("eval_loss",))["step"] == [0, 2, 4, 5]
