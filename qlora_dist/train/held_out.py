"""Held-out data: at the start, when it is due, and what a stop signal left owing."""

from __future__ import annotations

import json
from functools import partial

from ..cluster.stop_signal import StopRequested, StopSignal
from ..cluster.world import World
from ..config import RunConfig
from ..files import write_json
from .evaluate import evaluate
from .metrics import Metrics, format_evaluation
from .run_dir import RunDir, TrainState
from .setup import Data, is_due
from .step import Learner


def evaluate_held_out(world: World, learner: Learner, data: Data, stop: StopSignal) -> dict[str, float]:
    """Held-out values for a line of metrics.jsonl; nothing without data.eval. Raises StopRequested on all ranks."""
    if not data.held_out:
        return {}
    world.doing("evaluation")
    result = evaluate(
        learner.model,
        data.held_out,
        lambda batch: learner.update.run(partial(learner.nll_sum, batch)),
        world,
        lambda: stop.requested,
    )
    return {"eval_loss": result.loss, "eval_perplexity": result.perplexity, "eval_seconds": result.seconds}


def evaluate_unless_stopped(
    world: World, learner: Learner, data: Data, stop: StopSignal
) -> tuple[dict[str, float], bool]:
    """(held-out values, False), or (nothing, True) on all ranks when a stop signal cut it short."""
    try:
        return evaluate_held_out(world, learner, data, stop), False
    except StopRequested:
        return {}, True


def evaluate_start(
    config: RunConfig,
    run: RunDir,
    world: World,
    learner: Learner,
    data: Data,
    state: TrainState,
    metrics: Metrics,
    stop: StopSignal,
) -> dict[str, float]:
    """Held-out values before the first update, kept for the summary also over a resume."""
    kept = run.path / "eval_start.json"
    if state.step > 0 or not data.held_out or not config.train.eval_at_start:
        return world.from_main(lambda: json.loads(kept.read_text()) if kept.exists() else {})
    values = evaluate_held_out(world, learner, data, stop)
    world.from_main(lambda: write_json(kept, values))
    metrics.say(f"before training: {format_evaluation(values['eval_loss'], values['eval_perplexity'])}")
    return values


def evaluate_owed(
    config: RunConfig,
    world: World,
    learner: Learner,
    data: Data,
    state: TrainState,
    num_steps: int,
    metrics: Metrics,
    stop: StopSignal,
) -> None:
    """After a resume: makes up for the evaluation of the checkpoint's step if a stop signal cut it short."""
    was_due = state.step == num_steps or is_due(state.step, config.train.eval_every)
    if state.step > 0 and was_due and data.held_out and world.from_main(metrics.lacks_evaluation):
        values = evaluate_held_out(world, learner, data, stop)
        world.from_main(lambda: metrics.amend(values))
