"""Config -> data -> rows -> model -> steps -> checkpoints. `train` is the table of contents: read it first.

run              one start of a run: joining the ranks, and what its parts share
fit_memory       what `auto` stands for, the longest micro-batch first; out_of_memory: why it did not fit
check_start      what all ranks must agree on before the model is read
setup_data       sources -> documents -> rows -> this rank's micro-batches
setup_model      4-bit base -> adapters -> optimizer and reduction (strategy)
step             one optimizer update
evaluation       held-out loss, by the loss code of training
save_and_resume  checkpoints, results; checkpoint: their files; prompt_format: the template that goes with them
metrics, checks  what is reported, what is checked; run_page: the page of the run
"""

from __future__ import annotations

import time

from ..cluster.quiet import quiet_libraries
from ..cluster.stop_signal import StopSignal
from ..cluster.trackers import Trackers
from ..config import RunConfig
from ..console import Console
from .check_start import check_run
from .checks.learning import check_first_update
from .evaluation import evaluate_at_start, evaluate_if_due, evaluate_missed
from .fit_memory import resolve_auto, try_longest
from .metrics import Metrics, restart_peak, step_values
from .out_of_memory import explain_out_of_memory
from .run import Run, TrainState, join_ranks, open_run_dir, place_of_run, report_completed, report_stopped
from .run_page import RunPage
from .save_and_resume import begin, finish, save
from .setup_data import build_data, count_steps
from .setup_model import build_model, check_base
from .step import train_step


def train(config: RunConfig, resume: str = "auto", fresh: bool = False) -> TrainState:
    """Trains until the last step of the config or a stop signal. `resume`: auto, never, or a checkpoint folder.
    `fresh`: a run that is in its directory is set aside first.

    Raises UserError, wherever possible before the model is read, and RunFailed, on all ranks together.
    """
    # 1. join the ranks, open the run directory
    with (
        quiet_libraries(),
        StopSignal() as stop,
        Console() as console,
        place_of_run(config) as place,
        RunPage(place[0], stop) as page,
        join_ranks(config, stop, console) as world,
        Trackers(config.logging.trackers, config.run_dir) as trackers,
    ):
        run_dir, config = open_run_dir(config, place, world, console, resume, fresh)
        if (steps := world.from_main(lambda: run_dir.completed_steps(config.train.length))) is not None:
            return report_completed(run_dir, console, steps)

        # 2. resolve what depends on memory; check what all ranks must agree on before anything is read
        fit = resolve_auto(config, world)
        config = fit.config  # from here on without `auto`
        console.print(check_run(config, world, run_dir, fit.plan), "machine")

        # 3. data: sources -> documents -> rows -> micro-batches of each rank and step
        data = build_data(config, world)
        num_steps = count_steps(config, data)
        with (
            Metrics(run_dir, console, num_steps, trackers, page) as metrics,
            explain_out_of_memory(fit, world) as progress,
        ):
            run = Run(config, world, run_dir, stop, data, num_steps, metrics)
            run.describe(fit.text)

            # 4. model: 4-bit base -> adapters -> optimizer
            run.read_sources()
            progress.model = model = build_model(config, world)
            console.print(check_base(config, world, model))
            model.build_peak_bytes = restart_peak(world.device)

            # 5. resume from the newest checkpoint
            state = begin(run, model, resume, fit.plan)
            try_longest(run, model, state, progress)
            loss_at_start = evaluate_at_start(run, model, state)
            evaluate_missed(run, model, state)

            # 6. train step by step
            waited_since, is_stopping = time.perf_counter(), False
            for rows in data.loader.iterate(state.step, num_steps, pin_memory=world.device.type == "cuda"):
                started = time.perf_counter()
                progress.place = f"step {state.step + 1}"
                world.begin_step(state.step + 1)
                lr = run.learning_rate(state.step)
                stats = train_step(
                    world, model, rows, step=state.step, seed=config.seed, lr=lr, stop_requested=stop.requested
                )
                if state.step == 0:
                    check_first_update(model.update.each_weight())
                state = state.after(stats)
                seconds, waited = time.perf_counter() - started, started - waited_since
                values = step_values(world.device, state.step, stats, rows, lr, seconds, waited)
                held_out, is_stopping = evaluate_if_due(run, model, state.step, stats.stop_requested)
                metrics.step(values | held_out, stats.expert_slots)
                if is_stopping or run.saves_after(state.step):
                    save(run, model, state)
                if is_stopping:
                    break
                waited_since = time.perf_counter()

            # 7. finish
            if is_stopping:
                return report_stopped(run, state)
            return finish(run, model, state, loss_at_start, fit.plan)
    return TrainState(stopped_by=stop.name)  # before the first step
