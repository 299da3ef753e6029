"""Config -> data -> rows -> model -> steps -> checkpoints. Read this file first: `train` is the table of contents.

setup                        what happens once: the parts of a run, made from the config
check_start                  what all ranks must agree on before the model is read
fit_memory                   what fits in memory, and what it means when it does not
strategy                     the strategy: what turns gradients into an update
save_and_resume              checkpoints, resume, results
held_out                     evaluation while training
step                         what happens again and again: one optimizer update
checkpoint, metrics, checks  what is kept, what is said, what is checked
..data                       sources -> documents -> rows -> this rank's micro-batches
..model                      4-bit base -> packed attention -> LoRA in fp32
..optim                      gradients -> AdamW, the same under every strategy
..cluster                    ranks, and what they do together
"""

from __future__ import annotations

import time

from ..cluster.stop_signal import StopSignal
from ..config import RunConfig
from . import fit_memory as fitting
from . import held_out
from . import save_and_resume as keeping
from . import setup as stages
from .checks import check_first_update
from .metrics import Metrics, restart_peak
from .run_dir import TrainState
from .step import train_step


def train(config: RunConfig, resume: str = "auto") -> TrainState:
    """Trains until the config's last step or a stop signal. `resume`: auto, never, or a checkpoint folder.

    Raises UserError (what the user gave) before the model is read wherever that can be known, RunFailed (what went
    wrong while running) on all ranks together.
    """
    with StopSignal() as stop, stages.join(config, stop) as world, stages.open_run(config, world, resume) as run:
        if (done := world.from_main(lambda: run.completed_steps(config.train.length))) is not None:
            return stages.say_completed(run, world, done)
        fit = fitting.settle(config, world)
        config = fit.config  # from here on no `auto` in what decides memory
        stages.check(config, world, run, fit.plan)

        # data: sources -> documents -> rows -> who trains what at which step
        data = stages.build_data(config, world)
        num_steps = stages.count_steps(config, data)
        with (
            Metrics(run, world.is_main, num_steps, "tensorboard" in config.logging.trackers) as metrics,
            fitting.explaining_out_of_memory(fit, world) as progress,
        ):
            metrics.say(stages.describe(config, world, data, num_steps) + fit.text)

            # model: 4-bit base -> adapters -> what updates them
            progress.learner = learner = stages.build_learner(config, world)
            metrics.say(stages.check_base(config, world, learner))
            learner.build_peak_bytes = restart_peak(world.device)
            state = keeping.resume(config, run, world, learner, data, metrics, resume)
            metrics.start(state.step)
            world.start_trackers(config.logging.project, config.model_dump(mode="json"))
            fitting.try_longest(config, world, learner, data, state, num_steps, progress, metrics)
            before = held_out.evaluate_start(config, run, world, learner, data, state, metrics, stop)
            held_out.evaluate_owed(config, world, learner, data, state, num_steps, metrics, stop)

            waited_since, is_stopping = time.perf_counter(), False
            for rows in data.loader.iterate(state.step, num_steps, pin_memory=world.device.type == "cuda"):
                started = time.perf_counter()
                progress.place = f"step {state.step + 1}"
                world.stepping(state.step + 1)
                stats = train_step(
                    world,
                    learner,
                    rows,
                    step=state.step,
                    seed=config.seed,
                    lr=(lr := stages.scheduled_lr(config, state.step, num_steps)),
                    stop_requested=stop.requested,
                )
                if state.step == 0:
                    with learner.update.whole_weights():
                        check_first_update(learner.model)
                state = state.after(stats)
                values = stages.step_values(
                    world, state, stats, rows, lr, time.perf_counter() - started, started - waited_since
                )
                is_stopping = stats.stop_requested
                if not is_stopping and (state.step == num_steps or stages.is_due(state.step, config.train.eval_every)):
                    found, is_stopping = held_out.evaluate_unless_stopped(world, learner, data, stop)
                    values |= found
                is_last = state.step == num_steps or is_stopping
                metrics.step(values)
                world.log(values, state.step)
                if is_last or stages.is_due(state.step, config.train.save_every):
                    keeping.save(config, run, world, learner, data, state)
                if is_last:
                    break
                waited_since = time.perf_counter()
            if is_stopping:
                return keeping.say_stopped(run, world, state, stop)
            return keeping.finish(config, run, world, learner, data, state, before, metrics, fit.plan)
    return TrainState(stopped_by=stop.name)  # before the first step
