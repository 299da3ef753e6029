"""Accelerate's experiment trackers: wandb, mlflow, comet_ml, ... TensorBoard is written by `train.metrics` itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from ..errors import UserError
from .stop_signal import StopRequested

log = logging.getLogger(__name__)


class Trackers:
    """Context manager around a run's trackers. All methods are called by all ranks; rank 0's values are logged."""

    def __init__(self, names: Sequence[str], folder: str) -> None:
        """Raises UserError for a tracker that accelerate does not know. Called after `World.init`."""
        others = [name for name in names if name != "tensorboard"]
        self._accelerator: Accelerator | None = None
        if others:
            try:
                self._accelerator = Accelerator(log_with=others, project_dir=folder)
            except ValueError as error:
                raise UserError(f"logging.trackers {list(names)}: {error}") from None

    def start(self, project: str, config: dict[str, Any]) -> None:
        """Begins a tracked run of this project, with its config."""
        if self._accelerator is not None:
            self._accelerator.init_trackers(project, config=config)

    def log(self, values: dict[str, float], step: int) -> None:
        """Values of one update."""
        if self._accelerator is not None:
            self._accelerator.log(values, step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Sends what is buffered, unless the run failed. A tracker that cannot do so does not fail a finished run."""
        if self._accelerator is None or not (kind is None or issubclass(kind, StopRequested)):
            return
        # not `end_training`, which also destroys the process group
        for tracker in self._accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                log.warning("tracker %s could not finish: %s", tracker.name, error)
