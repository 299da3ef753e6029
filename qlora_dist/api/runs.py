"""A run directory as an object: its metrics, summary and page; and several runs in one page. Needs no torch."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..commands.report import report, run_directory
from ..config import RunConfig
from ..config import load_config as load_config_file
from ..config.run_dir import RunDir, read_metrics
from ..errors import printable
from ..pages import read_run


class Run:
    """A run: `Run("runs/alpaca-7b")`, or what `train` returns. Everything is read from its directory when asked for."""

    def __init__(self, directory: str | Path, stopped_by: str | None = None) -> None:
        """Raises UserError where there is no run. `stopped_by`: the signal that ended this start before its end."""
        # one that was stopped before its first step has left nothing
        self.directory: Path = Path(directory) if stopped_by else run_directory(str(directory))
        self.stopped_by = stopped_by
        self._files = RunDir(self.directory)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.directory.resolve().name

    @property
    def config(self) -> RunConfig:
        """The resolved config."""
        return load_config_file(self._files.config)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict for each step: step, loss, lr, grad_norm, tokens, tokens_per_second, peak_bytes, ..., and where it
        was evaluated eval_loss and eval_perplexity. `pandas.DataFrame(run.metrics)` is a table."""
        return list(read_metrics(self._files.metrics))

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: the final values; empty until the run is finished."""
        return read_run(self.directory).summary

    @property
    def page(self) -> Path:
        """The run's page, one HTML file."""
        return self._files.report

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format, once the run is finished."""
        return self._files.adapter

    @property
    def is_finished(self) -> bool:
        """Whether its last step is done and its results are written."""
        return self._files.completed.is_file()

    @property
    def step(self) -> int:
        """Steps that are in its metrics."""
        return max((line["step"] for line in self.metrics), default=0)

    def facts(self) -> dict[str, str]:
        """What a reader asks first, as text."""
        metrics = self.metrics
        last = metrics[-1] if metrics else {}
        held_out = next((line["eval_loss"] for line in reversed(metrics) if "eval_loss" in line), None)
        stopped = f"stopped by {self.stopped_by}" if self.stopped_by else "not finished"
        state = "finished" if self.is_finished else stopped
        found = {"state": state, "steps": f"{self.step:,}"}
        if "loss" in last:
            found["loss"] = f"{last['loss']:.4f}"
        if held_out is not None:
            found["held-out loss"] = f"{held_out:.4f}"
        if "tokens_per_second" in last:
            found["tokens/s"] = f"{last['tokens_per_second']:,.0f}"
        return found

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts().items())
        return printable(f"<Run {self.directory}: {facts}>")

    def _repr_html_(self) -> str:
        rows = {"directory": str(self.directory), **self.facts(), "page": str(self.page)}
        cells = "".join(
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(printable(value))}</td></tr>'
            for name, value in rows.items()
        )
        return f"<table>{cells}</table>"


def compare(runs: Iterable[Run | str | Path], out: str | Path) -> Path:
    """Lays the curves of several runs over each other in one HTML page, with what differs in their configs, and returns
    its path. Raises UserError."""
    report([str(one.directory if isinstance(one, Run) else one) for one in runs], str(out))
    return Path(out)
