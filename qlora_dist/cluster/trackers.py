"""Accelerate's experiment trackers: wandb, mlflow, comet_ml, ... TensorBoard is written by `train.metrics` itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .stop_signal import StopRequested

if TYPE_CHECKING:
    from accelerate import Accelerator  # takes seconds: `require_trackers` does without it

# Accelerate's trackers -> the modules of which each needs one
_MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "comet_ml": ("comet_ml",),
    "aim": ("aim",),
    "mlflow": ("mlflow",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}
log = logging.getLogger(__name__)


def require_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is unknown or not installed. Accelerate would only warn of the latter."""
    for name in names:
        modules = _MODULES.get(name)
        if modules is None:
            raise UserError(f"logging.trackers names {name!r}; expected some of {', '.join(_MODULES)}")
        if not any(find_spec(module) for module in modules):
            raise UserError(
                f"logging.trackers names {name}, which is not installed here: the run would not be tracked. "
                f"pip install {modules[0].replace('_', '-')}, or leave it out (--set logging.trackers=[])"
            )


class Trackers:
    """Context manager around a run's trackers. All methods are called by all ranks; rank 0's values are logged."""

    def __init__(self, names: Sequence[str], folder: str) -> None:
        """Raises UserError for a tracker that cannot be used. Called after `World.init`."""
        require_trackers(names)
        others = [name for name in names if name != "tensorboard"]
        self._accelerator: Accelerator | None = None
        if others:
            from accelerate import Accelerator

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
