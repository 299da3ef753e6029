"""What a run reports of its steps: progress, metrics.jsonl, TensorBoard, trackers. Rank 0 writes.

The only module that imports tensorboard.
"""

from __future__ import annotations

import gc
import json
import math
import resource
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import torch

from ..cluster.trackers import Trackers
from ..config import RunConfig
from ..config.run_dir import RunDir, num_damaged_metrics, read_metrics
from ..console import Console, about
from ..data.loader import StepRows
from ..errors import os_errors
from ..files import format_bytes, write_text
from ..progress import format_seconds
from .expert_load import IdleExperts, Slots, load_values
from .run_page import RunPage
from .step import StepStats

SMOOTHING = 0.9  # weight of the steps before in the smoothed loss
RECENT = 50  # steps that the time left is estimated from


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process so far, bytes: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB


def restart_peak(device: torch.device) -> int:
    """The peak until now, bytes. From here on `peak_bytes` of a GPU covers only what follows (on a CPU always the whole
    process).

    Garbage is returned to the device: models contain reference cycles and outlive their run, and blocks that were
    split while a model was built do not fit the requests of a step (65B, r = 64: 3.4 GiB more would be reserved).
    """
    peak = peak_bytes(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def step_values(
    device: torch.device, step: int, stats: StepStats, rows: StepRows, lr: float, seconds: float, data_seconds: float
) -> dict[str, Any]:
    """The line of metrics.jsonl for one update; `step` counts from 1."""
    return {
        "step": step,
        "epoch": rows.epoch,
        "loss": stats.loss,
        "lr": lr,
        "grad_norm": stats.grad_norm,
        "num_labels": stats.num_labels,
        "tokens": stats.num_tokens,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "tokens_per_second": stats.num_tokens / (seconds + data_seconds),
        "peak_bytes": peak_bytes(device),
        "imbalance": rows.imbalance,
        **load_values(stats.expert_slots),
    }


class Metrics:
    """Context manager that records each step's values. Ranks other than 0 only take part in the trackers."""

    def __init__(self, run_dir: RunDir, console: Console, num_steps: int, trackers: Trackers, page: RunPage) -> None:
        self.console = console
        self.page = page
        self.eval_seconds: float | None = None  # of the newest evaluation
        self.is_cost_announced = False  # of evaluations
        self._run_dir = run_dir
        self._num_steps = num_steps
        self._trackers = trackers
        self._eval_every: int | None = None
        self._file: TextIO | None = None
        self._writer: Any = None
        self._started = console.now()
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._num_seen = 0
        self._idle_experts = IdleExperts()
        self._smoothed = 0.0  # biased towards 0 until it is divided by 1 - SMOOTHING ** seen

    def start(self, step: int, config: RunConfig, **of_start: Any) -> None:
        """Opens the files for a run that continues after `step` updates, and starts the trackers. Lines of later steps,
        written before an interruption, are removed: every step appears in metrics.jsonl once. `of_start`: for the
        history of the run."""
        self._trackers.start(config.logging.project, config.model_dump(mode="json"))
        self._eval_every = config.train.eval_every
        self._started = self.console.now()
        if not self.console.is_main:
            return
        with self._disk_errors():
            if num_damaged := num_damaged_metrics(self._run_dir.metrics):
                self.console.print(f"{self._run_dir.metrics}: damaged lines are left out ({num_damaged})")
            self._rewrite([line for line in read_metrics(self._run_dir.metrics) if line["step"] <= step])
            if "tensorboard" in config.logging.trackers:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._run_dir.tensorboard), purge_step=step + 1)
        said = self.console.unlogged
        self.console.keep_log(self._run_dir.log)
        self.page.begin(step, num_steps=self._num_steps, said=said, **of_start)

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        if self._file is not None:
            self._file.close()
        write_text(self._run_dir.metrics, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = open(self._run_dir.metrics, "a", encoding="utf-8")  # noqa: SIM115  closed by __exit__

    def _disk_errors(self) -> AbstractContextManager[None]:
        return os_errors(
            f"{self._run_dir.metrics} or tensorboard could not be written", "The checkpoints were not touched"
        )

    def lacks_evaluation(self) -> bool:
        """Whether the last line of metrics.jsonl has no held-out values. Rank 0 only."""
        last = list(read_metrics(self._run_dir.metrics))[-1:]
        return bool(last) and "eval_loss" not in last[0]

    def amend(self, values: dict[str, Any]) -> None:
        """Adds held-out values to the last line of metrics.jsonl. Rank 0 only."""
        assert self._file is not None, "start comes first"
        lines = list(read_metrics(self._run_dir.metrics))
        lines[-1] |= values
        with self._disk_errors():
            self._rewrite(lines)
        self.page.add_held_out(lines[-1]["step"], values)
        self.console.print(f"step {lines[-1]['step']}: {describe_evaluation(values)}")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._writer):
            if file is not None:
                with suppress(OSError):  # a full disk: each line was flushed, and the one that failed has ended the run
                    file.close()

    def step(self, values: dict[str, Any], expert_slots: Slots = MappingProxyType({})) -> None:
        """Values of one update, with held-out ones (`eval_...`) if it was evaluated; `step` counts from 1. Experts that
        have got nothing for long are named."""
        if (idle := self._idle_experts.add(expert_slots)) is not None:
            self.console.print(f"warning: {idle}")
        self._trackers.log(values, values["step"])
        self._seconds.append(values["step_seconds"] + values["data_seconds"])
        self._num_seen += 1
        if not self.console.is_main:
            return
        with self._disk_errors():
            self._write(values)
        self._progress(values)
        self.page.add(values)
        if "eval_loss" in values:
            self.page.draw()
            self.console.print(f"step {values['step']}: {describe_evaluation(values)}")

    @property
    def seconds_per_step(self) -> float | None:
        """Of the newest steps in this process, without the first one, which warms up; None before there are any."""
        timed = list(self._seconds)[self._num_seen == len(self._seconds) :]
        return sum(timed) / len(timed) if timed else None

    def _write(self, values: dict[str, Any]) -> None:
        assert self._file is not None, "start comes first"
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in values.items():
                if key != "step":
                    group = "eval" if key.startswith("eval_") else "train"
                    self._writer.add_scalar(f"{group}/{key.removeprefix('eval_')}", value, values["step"])

    def _progress(self, values: dict[str, Any]) -> None:
        step = values["step"]
        self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * values["loss"]
        smoothed = self._smoothed / (1 - SMOOTHING**self._num_seen)
        self.console.progress(
            "step",
            step,
            self._num_steps,
            [
                f"loss {smoothed:.4f}",
                f"left {format_seconds(self._seconds_left(step))}",
                f"{values['tokens_per_second']:,.0f} tok/s",
                format_bytes(values["peak_bytes"]),
            ],
            [
                f"elapsed {format_seconds(self.console.now() - self._started)}",
                f"unsmoothed {values['loss']:.4f}",
                f"lr {values['lr']:.2e}",
                f"grad {values['grad_norm']:.3g}",
            ],
            is_edge=step == self._num_steps or self._num_seen == 1,
        )

    def _seconds_left(self, step: int) -> float:
        """Of the steps that are left, and of their evaluations if one was timed."""
        num_steps = self._num_steps - step
        seconds = sum(self._seconds) / len(self._seconds) * num_steps
        return seconds + (self.eval_seconds or 0.0) * num_evaluations(step, self._num_steps, self._eval_every)


def num_evaluations(done: int, num_steps: int, every: int | None) -> int:
    """How many are due after steps done + 1 .. num_steps: every `every` steps, and after the last one."""
    if done >= num_steps:
        return 0
    return 1 if every is None else -(-num_steps // every) - done // every


def format_evaluation(loss: float, perplexity: float) -> str:
    """held-out loss 1.2345, perplexity 3.437"""
    return f"held-out loss {loss:.4f}, perplexity {perplexity:.3f}"


def describe_evaluation(values: Mapping[str, float]) -> str:
    """That, and its time, of the values of a line of metrics.jsonl."""
    text = format_evaluation(values["eval_loss"], values["eval_perplexity"])
    return f"{text}; it took {about(values['eval_seconds'])}"


def median_tokens_per_second(metrics: Path) -> float | None:
    """Median over the recorded steps; None without steps."""
    found = (line.get("tokens_per_second") for line in read_metrics(metrics))
    rates = sorted(rate for rate in found if isinstance(rate, int | float))
    return rates[len(rates) // 2] if rates else None


def whole_run(lines: Sequence[Mapping[str, Any]], at_start: Mapping[str, Any]) -> dict[str, float | int | None]:
    """What the steps of all starts of a run add up to: seconds of steps, waits for data and evaluations; the mean loss
    over labels; the best held-out loss and the step after which it was found (0: before training).

    `lines`: of metrics.jsonl; `at_start`: held-out values before the first step.
    """
    timed = [_number(line, key) for line in lines for key in ("step_seconds", "data_seconds", "eval_seconds")]
    labelled = [(_number(line, "loss"), _number(line, "num_labels")) for line in lines]
    num_labels = sum(count or 0 for loss, count in labelled if loss is not None)
    total_loss = sum(loss * (count or 0) for loss, count in labelled if loss is not None)
    evaluated = [(_number(at_start, "eval_loss"), 0), *((_number(line, "eval_loss"), line["step"]) for line in lines)]
    best_loss, best_step = min(((loss, step) for loss, step in evaluated if loss is not None), default=(None, None))
    return {
        "seconds": sum(one or 0.0 for one in (*timed, _number(at_start, "eval_seconds"))),
        "mean_loss": total_loss / num_labels if num_labels else None,
        "best_eval_loss": best_loss,
        "best_eval_step": best_step,
    }


def _number(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a file that may be damaged."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
