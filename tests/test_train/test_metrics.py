"""What a run says: each step once, plainly when nobody watches."""

import io
import json
import os
import signal

import pytest
import torch

from qlora_dist.cluster.stop_signal import StopSignal
from qlora_dist.cluster.trackers import Trackers
from qlora_dist.config import parse_config
from qlora_dist.config.changes import config_changes
from qlora_dist.config.run_dir import RunDir, read_metrics
from qlora_dist.console import Console
from qlora_dist.data.loader import StepRows
from qlora_dist.errors import RunFailed
from qlora_dist.files import write_json, write_text
from qlora_dist.progress import format_seconds
from qlora_dist.train.checks.learning import check_first_update
from qlora_dist.train.metrics import (
    Metrics,
    median_tokens_per_second,
    num_evaluations,
    peak_bytes,
    restart_peak,
    step_values,
    whole_run,
)
from qlora_dist.train.run_page import RunPage
from qlora_dist.train.step import StepStats


def _values(step, **more):
    return {
        "step": step, "loss": 2.0, "grad_norm": 0.5, "lr": 1e-4, "step_seconds": 0.75, "data_seconds": 0.25,
        "tokens_per_second": 100.0 + step, "peak_bytes": 2**30, **more,
    }  # fmt: skip


def _config(tmp_path, trackers):
    return parse_config(
        {
            "run_dir": str(tmp_path),
            "model": {"name": "base"},
            "data": {"train": [{"path": "data.jsonl"}]},
            "train": {"steps": 1},
            "logging": {"trackers": trackers},
        }
    )


def _run(tmp_path, steps, start=0, stream=None, is_main=True, tensorboard=False, clock=None):
    run = RunDir(tmp_path)
    trackers = ("tensorboard",) if tensorboard else ()
    console = Console(is_main, stream or io.StringIO(), clock or (lambda: 0.0))
    with console, Metrics(run, console, 100, Trackers((), ""), RunPage(run, StopSignal())) as metrics:
        metrics.start(start, _config(tmp_path, trackers))
        for step in steps:
            metrics.step(_values(step))
    return run


def test_steps_of_an_earlier_life_stand_once_after_a_resume(tmp_path):
    run = _run(tmp_path, range(1, 8))
    with open(run.metrics, "a") as file:
        file.write('{"step": 8, "lo')  # cut short by a crash
    _run(tmp_path, range(5, 10), start=4)
    assert [line["step"] for line in read_metrics(run.metrics)] == list(range(1, 10))
    assert median_tokens_per_second(run.metrics) == 105.0


def test_other_ranks_write_and_say_nothing(tmp_path):
    stream = io.StringIO()
    run = _run(tmp_path, range(1, 4), stream=stream, is_main=False)
    assert stream.getvalue() == "" and not run.metrics.exists()


def test_output_is_plain_lines_when_it_is_no_terminal(tmp_path):
    plain = io.StringIO()
    _run(tmp_path, range(1, 50), stream=plain)
    assert "\r" not in plain.getvalue() and len(plain.getvalue().splitlines()) == 1  # the others came within seconds
    start = "step 1/100  loss 2.0000  left 1:39  101 tok/s  1.00 GiB  elapsed 0:00  unsmoothed 2.0000  "
    assert plain.getvalue() == f"{start}lr 1.00e-04  grad 0.5\n"


def test_the_smoothed_loss_begins_unbiased_and_follows_slowly(tmp_path):
    console = Console(True, stream := io.StringIO(), lambda: 0.0)
    with Metrics(RunDir(tmp_path), console, 3, Trackers((), ""), RunPage(RunDir(tmp_path), StopSignal())) as metrics:
        metrics.start(0, _config(tmp_path, ()))
        for step, loss in enumerate((4.0, 4.0, 1.0), 1):
            metrics.step(_values(step, loss=loss))
    first, last = stream.getvalue().splitlines()
    assert "  loss 4.0000" in first
    assert f"  loss {4 - 3 * 0.1 / (1 - 0.9**3):.4f}" in last and "unsmoothed 1.0000" in last


def test_the_time_left_counts_the_evaluations_to_come(tmp_path):
    console = Console(True, stream := io.StringIO(), lambda: 0.0)
    with Metrics(RunDir(tmp_path), console, 100, Trackers((), ""), RunPage(RunDir(tmp_path), StopSignal())) as metrics:
        config = _config(tmp_path, ())
        metrics.start(0, config.model_copy(update={"train": config.train.model_copy(update={"eval_every": 40})}))
        metrics.eval_seconds = 10.0
        metrics.step(_values(1))
    assert f"left {format_seconds(99 + 3 * 10)}" in stream.getvalue()  # after steps 40, 80 and 100
    assert [num_evaluations(done, 100, 40) for done in (0, 39, 40, 80, 99, 100)] == [3, 3, 2, 1, 1, 0]
    assert [num_evaluations(done, 100, None) for done in (0, 99, 100)] == [1, 1, 0]


def test_tensorboard_gets_train_and_held_out_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir(tmp_path)
    with Metrics(run, Console(True, io.StringIO()), 2, Trackers((), ""), RunPage(run, StopSignal())) as metrics:
        metrics.start(0, _config(tmp_path, ("tensorboard",)))
        metrics.step(_values(1))
        metrics.step(_values(2, eval_loss=1.5, eval_perplexity=4.48, eval_seconds=3.0))
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Scalars("eval/loss")[0].value == 1.5


def test_times_and_peaks_have_their_units():
    assert [format_seconds(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
    assert 2**26 < peak_bytes(torch.device("cpu")) < 2**37


def test_the_rate_counts_the_wait_for_data(tmp_path):
    rows = StepRows([], 5, 600, 0.5, (0,), 1.0)
    stats = StepStats(2.0, 0.5, num_labels=5, num_tokens=600, stop_requested=False)
    values = step_values(torch.device("cpu"), 1, stats, rows, 1e-4, seconds=2.0, data_seconds=1.0)
    assert values["tokens_per_second"] == 200.0
    lines = [{"step": step, "tokens_per_second": rate} for step, rate in enumerate((9.0, 5.0, 1.0, 2.0, 7.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert median_tokens_per_second(tmp_path / "metrics.jsonl") == 5.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    assert median_tokens_per_second(tmp_path / "metrics.jsonl") == 5.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_signals_become_a_flag_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_adapter_that_did_not_move_ends_the_run():
    model = torch.nn.Module()
    model.register_parameter("a_lora_B", torch.nn.Parameter(torch.ones(2)))
    model.register_parameter("b_lora_B", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(RunFailed, match="1 of 2 LoRA B matrices are still zero, such as b_lora_B"):
        check_first_update(model.named_parameters())
    model.b_lora_B.data[0] = 1e-8
    check_first_update(model.named_parameters())


def test_config_changes_name_each_key_but_the_free_ones():
    there = "run_dir: a\nlora: {rank: 4, dropout: 0.1}\nmemory: {recompute: full}\noptim: {lr: 1.0}\n"
    now = "run_dir: b\nlora: null\nmemory: {recompute: none}\noptim: {lr: 2.0}\n"
    lines = config_changes(there, now)
    assert "  optim.lr: was 1.0, now 2.0" in lines and "  lora.rank: was 4, now None" in lines
    assert not any("run_dir" in line or "memory" in line for line in lines)
    assert config_changes(there, now, ("optim.lr", "lora")) == []


def test_files_are_replaced_whole_and_json_has_no_nan(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": float("nan"), "b": [1.5, float("inf")]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None]}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert json.loads(path.read_text())["b"][0] == 1.5 and [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_peak_begins_anew_with_what_is_dead_given_back():
    device = torch.device("cuda", torch.cuda.current_device())
    restart_peak(device)
    before, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    circle = [torch.empty(2**26, dtype=torch.uint8, device=device)]
    circle.append(circle)  # as a model that keeps its own method
    del circle
    assert restart_peak(device) >= before + 2**26
    assert (peak_bytes(device), torch.cuda.memory_reserved(device)) == (before, reserved)


def test_the_peak_of_a_cpu_is_that_of_its_process():
    assert restart_peak(torch.device("cpu")) == peak_bytes(torch.device("cpu")) > 0


def test_a_summary_adds_up_the_whole_run():
    times = {"step_seconds": 1.0, "data_seconds": 0.5}
    lines = [
        {"step": 1, "loss": 4.0, "num_labels": 1, **times},
        {"step": 2, "loss": 1.0, "num_labels": 3, **times, "eval_loss": 2.5, "eval_seconds": 7.0},
        {"step": 3, "loss": 1.0, "num_labels": 0, **times, "eval_loss": 2.6, "eval_seconds": 7.0},
        {"step": 4, "loss": float("nan"), "num_labels": 5, "step_seconds": "x", "eval_loss": float("nan")},
    ]
    found = whole_run(lines, {"eval_loss": 9.0, "eval_seconds": 10.0})
    assert found == {"seconds": 28.5, "mean_loss": 7 / 4, "best_eval_loss": 2.5, "best_eval_step": 2}
    assert whole_run(lines, {"eval_loss": 2.4})["best_eval_step"] == 0
    nothing = {"seconds": 0, "mean_loss": None, "best_eval_loss": None, "best_eval_step": None}
    assert whole_run([], {}) == whole_run([], {"eval_loss": "damaged"}) == nothing
