"""Accelerate's experiment trackers: wandb, mlflow, comet_ml, ... TensorBoard is written by `train.metrics` itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from ..errors import UserError


class Trackers:
    """The trackers of a run. All methods are called by all ranks; rank 0's values are logged."""

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

    def end(self) -> None:
        """The run is over; what is buffered is sent."""
        if self._accelerator is not None:
            self._accelerator.end_training()
