"""report.html and history.jsonl of a run, written by rank 0 while it runs. A failure to write them never ends it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..cluster.stop_signal import StopRequested, StopSignal
from ..config.run_dir import RunDir
from ..pages import Curves, append_event, read_curves, read_run, write_report

log = logging.getLogger(__name__)


class RunPage:
    """Context manager around a whole start of a run, whose end it records. Does nothing until `begin`: on other ranks
    never."""

    def __init__(self, run_dir: RunDir, stop: StopSignal) -> None:
        self._run_dir = run_dir
        self._stop = stop
        self._curves: Curves | None = None
        self._step = 0
        self._has_ended = False
        self._has_warned = False

    def begin(self, step: int, **values: Any) -> None:
        """Rank 0, once the run is in its directory and metrics.jsonl ends at `step`. `values`: of the start's line in
        history.jsonl."""
        self._step = step
        with self._never_fails():
            self._curves = read_curves(self._run_dir)
            append_event(self._run_dir.history, "start", step=step, **values)
        self.draw()

    def add(self, values: dict[str, Any]) -> None:
        """The values of a step, as for metrics.jsonl."""
        if self._curves is not None:
            self._step = values["step"]
            self._curves.add(values)

    def add_held_out(self, step: int, values: dict[str, Any]) -> None:
        """Held-out values after `step` updates that come without those of the step, and the page with them."""
        if self._curves is not None:
            self._curves.add_held_out(step, values)
            self.draw()

    def draw(self) -> None:
        """Writes the page as of now."""
        if self._curves is not None:
            with self._never_fails():
                self._run_dir.require_present()  # not into what has taken its place
                run = read_run(self._run_dir.path, self._curves)
                write_report([run], self._run_dir.report, is_running=not self._has_ended)

    def finished(self) -> None:
        """The results are written."""
        self._end("finished")

    def _end(self, kind: str, text: str = "") -> None:
        if self._curves is None or (self._has_ended and kind != "failed"):
            return
        self._has_ended = True
        with self._never_fails():
            self._run_dir.require_present()
            append_event(self._run_dir.history, "end", step=self._step, kind=kind, text=text)
        self.draw()

    def __enter__(self) -> RunPage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, StopRequested):
            self._end("stopped", f"by {self._stop.name}" if self._stop.name else "by a signal to another rank")
        else:
            self._end("failed", str(error) or type(error).__name__)

    @contextmanager
    def _never_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._has_warned:
                log.warning(
                    "%s cannot be written (%s: %s): training goes on without it, and `qlora-dist report %s` draws it "
                    "from metrics.jsonl",
                    self._run_dir.report, type(error).__name__, error, self._run_dir.path,
                )  # fmt: skip
            self._has_warned = True
