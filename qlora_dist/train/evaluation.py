"""Held-out loss and perplexity, by the loss code of training: at the start, when due, and after a resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from ..cluster.stop_signal import StopRequested
from ..config.json_file import read_json_object
from ..console import about, count
from ..data.accumulation import derive_accumulation
from ..data.packing import Batch
from ..errors import UserError, os_errors
from ..files import write_json
from ..model import evaluation_mode
from ..progress import track
from .metrics import describe_evaluation, num_evaluations
from .run import Run, TrainState
from .step import TrainingModel


class SumsOverRanks(Protocol):
    """What evaluation needs of `cluster.world.World`."""

    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor: ...

    def any(self, flag: bool) -> bool: ...


# Asking all ranks whether to stop waits for the device: not at every batch
BATCHES_PER_POLL = 4


@dataclass(frozen=True)
class EvalResult:
    """Held-out results over all ranks."""

    loss: float  # mean NLL per label
    perplexity: float
    num_labels: int
    seconds: float


@torch.no_grad()
def evaluate(
    module: torch.nn.Module,
    batches: Sequence[Batch],
    nll_sum: Callable[[Batch], torch.Tensor],
    world: SumsOverRanks,
    stop_requested: Callable[[], bool] | None = None,
    what: str = "evaluating batch",
) -> EvalResult:
    """Mean NLL over the labels of all ranks' batches. Every rank calls it, with filler where it has no rows.

    `nll_sum` returns the () sum of one batch's label NLL. Raises StopRequested on all ranks when any was asked to stop:
    part of the held-out data is not a valid result.
    """
    started = time.perf_counter()
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    with evaluation_mode(module), track(what, len(batches)) as task:
        for index, batch in enumerate(batches):
            # agreed on by all ranks: a forward pass may contain collectives (FSDP2)
            if stop_requested is not None and index % BATCHES_PER_POLL == 0 and world.any(stop_requested()):
                raise StopRequested
            totals[0] += nll_sum(batch.to(world.device)).double()
            totals[1] += batch.num_labels
            task.add()
    nll, num_labels = world.sum(totals).tolist()
    loss = nll / max(num_labels, 1)
    perplexity = math.exp(min(loss, 700.0))  # exp overflows above
    return EvalResult(loss, perplexity, int(num_labels), time.perf_counter() - started)


# --- while training ---------------------------------------------------------------------------------------------------


def evaluate_held_out(run: Run, model: TrainingModel) -> dict[str, float]:
    """Held-out values for a line of metrics.jsonl; empty without data.eval. Raises StopRequested on all ranks."""
    if not run.data.held_out:
        return {}
    run.world.set_status("evaluation")
    result = evaluate(
        model.module,
        run.data.held_out,
        lambda batch: model.update.forward(partial(model.nll_sum, batch)),
        run.world,
        lambda: run.stop.requested,
    )
    run.metrics.eval_seconds = result.seconds
    return {"eval_loss": result.loss, "eval_perplexity": result.perplexity, "eval_seconds": result.seconds}


def evaluate_if_due(run: Run, model: TrainingModel, step: int, is_stopping: bool) -> tuple[dict[str, float], bool]:
    """After `step` updates: (held-out values if they are due, whether to stop), equal on all ranks. A stop signal
    interrupts an evaluation, which is then made up for after the resume."""
    if is_stopping or not run.evaluates_after(step):
        _announce(run, step)
        return {}, is_stopping
    try:
        return evaluate_held_out(run, model), False
    except StopRequested:
        return {}, True


def _announce(run: Run, step: int) -> None:
    """What evaluations will cost, from the first steps, when none was timed."""
    to_come = num_evaluations(step, run.num_steps, run.config.train.eval_every)
    of_step = run.metrics.seconds_per_step
    if run.metrics.is_cost_announced or not run.data.held_out or of_step is None or not to_come:
        return
    run.metrics.is_cost_announced = True
    seconds = estimated_seconds(run, of_step)
    run.console.print(f"held-out data: {count(to_come, 'evaluation')} to come, about {about(seconds)} each")


def estimated_seconds(run: Run, of_step: float) -> float:
    """An evaluation's seconds from those of a step: a step's micro-batches run forward, through the layers that are
    recomputed once more, and backward, which for frozen weights is one pass and for trained ones two."""
    config = run.config
    batch = config.batch
    micro_steps = derive_accumulation(batch.rows_per_step, batch.resolved_micro_rows, run.world.size)
    passes = (2 if config.lora is not None else 3) + (config.memory.recompute != "none")
    return of_step / (micro_steps * passes) * len(run.data.held_out)


def evaluate_at_start(run: Run, model: TrainingModel, state: TrainState) -> dict[str, float]:
    """Held-out values before the first update, kept in a file for the summary of a resumed run."""
    kept = run.dir.eval_at_start
    if state.step > 0 or not run.data.held_out or not run.config.train.eval_at_start:
        return run.world.from_main(lambda: _kept_values(kept))
    values = evaluate_held_out(run, model)

    def keep() -> None:
        with os_errors(f"{kept}: cannot be written", "Nothing that was saved has changed"):
            write_json(kept, values)

    run.world.from_main(keep)
    run.metrics.page.add_held_out(0, values)
    to_come = num_evaluations(0, run.num_steps, run.config.train.eval_every)
    run.console.print(f"before training: {describe_evaluation(values)}, {to_come:,} more to come")
    run.metrics.is_cost_announced = True
    return values


def _kept_values(file: Path) -> dict[str, float]:
    """The values in the file; none when it is absent or damaged: they are for the summary alone."""
    try:
        return read_json_object(file, str(file))
    except UserError:
        return {}


def evaluate_missed(run: Run, model: TrainingModel, state: TrainState) -> None:
    """After a resume: catches up on the evaluation of the checkpoint's step if a stop signal interrupted it."""
    was_due = state.step > 0 and run.evaluates_after(state.step)
    if was_due and run.data.held_out and run.world.from_main(run.metrics.lacks_evaluation):
        values = evaluate_held_out(run, model)
        run.world.from_main(lambda: run.metrics.amend(values))
