"""What a run reports: a progress line, metrics.jsonl, TensorBoard, trackers. Rank 0 writes.

The only module that imports tensorboard.
"""

from __future__ import annotations

import gc
import json
import resource
import shutil
import sys
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from ..cluster.trackers import Trackers
from ..config import RunConfig
from ..config.run_dir import RunDir, num_damaged_metrics, read_metrics
from ..data.loader import StepRows
from ..errors import os_errors
from ..files import GIB, write_text
from .run_page import RunPage
from .step import StepStats

PLAIN_SECONDS = 10.0  # between progress lines when the output is not a terminal


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
    }


class Metrics:
    """Context manager that records each step's values. Ranks other than 0 only take part in the trackers."""

    def __init__(
        self,
        run_dir: RunDir,
        is_main: bool,
        num_steps: int,
        trackers: Trackers,
        page: RunPage,
        stream: TextIO | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._is_main = is_main
        self._num_steps = num_steps
        self._trackers = trackers
        self.page = page
        self._said: list[str] = []  # before the first step
        self._stream = stream if stream is not None else sys.stdout
        self._is_terminal = self._stream.isatty()
        self._file: TextIO | None = None
        self._writer: Any = None
        self._last_line = -1e9
        self._seconds: list[float] = []

    def start(self, step: int, config: RunConfig, **of_start: Any) -> None:
        """Opens the files for a run that continues after `step` updates, and starts the trackers. Lines of later steps,
        written before an interruption, are removed: every step appears in metrics.jsonl once. `of_start`: for the
        history of the run."""
        self._trackers.start(config.logging.project, config.model_dump(mode="json"))
        if not self._is_main:
            return
        with self._disk_errors():
            if num_damaged := num_damaged_metrics(self._run_dir.metrics):
                self.print(f"{self._run_dir.metrics}: damaged lines are left out ({num_damaged})")
            self._rewrite([line for line in read_metrics(self._run_dir.metrics) if line["step"] <= step])
            if "tensorboard" in config.logging.trackers:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._run_dir.tensorboard), purge_step=step + 1)
        self.page.begin(step, num_steps=self._num_steps, said="\n".join(self._said), **of_start)

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
        self.print(f"step {lines[-1]['step']}: {format_evaluation(values['eval_loss'], values['eval_perplexity'])}")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()
        for file in (self._file, self._writer):
            if file is not None:
                with suppress(OSError):  # a full disk: each line was flushed, and the one that failed has ended the run
                    file.close()

    def step(self, values: dict[str, Any]) -> None:
        """Values of one update, with held-out ones (`eval_...`) if it was evaluated; `step` counts from 1."""
        self._trackers.log(values, values["step"])
        if not self._is_main:
            return
        self._seconds.append(values["step_seconds"])
        with self._disk_errors():
            self._write(values)
        self._progress(values)
        self.page.add(values)
        if "eval_loss" in values:
            self.page.draw()
            self.print(f"step {values['step']}: {format_evaluation(values['eval_loss'], values['eval_perplexity'])}")

    def print(self, text: str) -> None:
        """A line for the user, after the progress line."""
        if self._is_main:
            if not self._seconds:
                self._said.append(text)
            self._end_line()
            print(text, file=self._stream, flush=True)

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
        step, now = values["step"], time.monotonic()
        is_edge = step == self._num_steps or len(self._seconds) == 1
        if not self._is_terminal and not is_edge and now - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = now
        recent = self._seconds[-50:]
        eta = sum(recent) / len(recent) * (self._num_steps - step)
        text = (
            f"step {step}/{self._num_steps}  loss {values['loss']:.4f}  grad {values['grad_norm']:.3g}  "
            f"lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tok/s  "
            f"{values['peak_bytes'] / GIB:.2f} GiB  left {format_seconds(eta)}"
        )
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            print("\r" + text[: width - 1].ljust(width - 1), end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)

    def _end_line(self) -> None:
        if self._is_terminal and self._is_main and self._seconds:
            print(file=self._stream)


def format_evaluation(loss: float, perplexity: float) -> str:
    """held-out loss 1.2345, perplexity 3.437"""
    return f"held-out loss {loss:.4f}, perplexity {perplexity:.3f}"


def format_seconds(seconds: float) -> str:
    """1:02:03, or 2:03 below one hour."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def median_tokens_per_second(metrics: Path) -> float | None:
    """Median over the recorded steps; None without steps."""
    found = (line.get("tokens_per_second") for line in read_metrics(metrics))
    rates = sorted(rate for rate in found if isinstance(rate, int | float))
    return rates[len(rates) // 2] if rates else None
