"""One start of a run: joining the ranks, opening its directory, and what its parts share (`Run`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..cluster.launcher import is_repeated_start, launched_job, require_own_strategy
from ..cluster.run_lock import RunLock
from ..cluster.stop_signal import StopRequested, StopSignal
from ..cluster.world import World
from ..config import RunConfig, dump_yaml
from ..config.changes import free_fields
from ..config.run_dir import RunDir
from ..console import Console, count
from ..data.accumulation import derive_accumulation
from ..data.templates import today
from ..errors import os_errors
from ..optim.adamw import lr_at
from .metrics import Metrics, restart_peak
from .setup_data import Data
from .source_digests import Digests, source_digests
from .step import StepStats
from .strategy import describe_strategy


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. All else that changes (data position, learning rate, dropout) is a function of the step."""

    step: int = 0  # completed optimizer updates
    num_tokens: int = 0  # seen so far, all ranks
    num_labels: int = 0
    stopped_by: str | None = None  # the signal that ended this start of the run before its last step
    started: str | None = None  # when the run began, see `utc_now`; None in runs of versions that did not record it

    def after(self, stats: StepStats) -> TrainState:
        """The state after one more update."""
        return replace(
            self,
            step=self.step + 1,
            num_tokens=self.num_tokens + stats.num_tokens,
            num_labels=self.num_labels + stats.num_labels,
        )


@dataclass(frozen=True)
class Run:
    """What saving, resuming, evaluation and reporting share."""

    config: RunConfig  # without `auto`
    world: World
    dir: RunDir
    stop: StopSignal
    data: Data
    num_steps: int  # of the whole run
    metrics: Metrics

    @cached_property
    def sources(self) -> Digests:
        """Digests of what the config names by a path, of when `read_sources` was called. Rank 0 only."""
        return source_digests(self.config)

    def read_sources(self) -> None:
        """Takes `sources`, before the model is read: a file that is unreadable, or replaced while it is loaded, is
        noticed. The other ranks wait without a limit."""
        what = "reading the files of the base and of lora.init_from"
        with self.world.stoppable(what):
            if self.world.is_main:
                _ = self.sources

    @property
    def console(self) -> Console:
        """Where rank 0 speaks."""
        return self.metrics.console

    def learning_rate(self, step: int) -> float:
        """Learning rate of 0-based update `step`."""
        optim = self.config.optim
        return lr_at(
            step,
            lr=optim.lr,
            schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
            num_steps=self.num_steps,
            min_lr_ratio=optim.min_lr_ratio,
        )

    def evaluates_after(self, num_done: int) -> bool:
        """Whether to evaluate held-out data after this many updates."""
        return num_done == self.num_steps or _is_due(num_done, self.config.train.eval_every)

    def saves_after(self, num_done: int) -> bool:
        """Whether to save a checkpoint after this many updates."""
        return num_done == self.num_steps or _is_due(num_done, self.config.train.save_every)

    def describe(self, memory: str) -> None:
        """Says what is about to start: data, steps and `memory` in lines with one column of labels."""
        config, world, data, say = self.config, self.world, self.data, self.console.print
        batch, stats = config.batch, data.documents.stats
        tokens, num_examples = f"{config.data.row_tokens:,} tokens", len(data.documents)
        held_out = ""
        if data.held_out:
            of_all = "" if data.num_evaluated == data.num_held_out else f" of {data.num_held_out:,}"
            held_out = f"; evaluates {data.num_evaluated:,}{of_all} held-out rows (train.eval_rows)"
        say(
            f"{count(num_examples, 'example')} in {count(len(data.rows), 'row')} of up to {tokens} "
            f"({data.rows.efficiency:.1%} full; truncated {stats.total('truncated'):,}, dropped "
            f"{stats.total('dropped'):,}, bad {stats.total('bad'):,}){held_out}",
            "data",
        )
        accumulation = derive_accumulation(batch.rows_per_step, batch.resolved_micro_rows, world.size)
        packed = round(batch.rows_per_step * num_examples / len(data.rows))
        say(
            f"{self.num_steps:,}; {count(batch.rows_per_step, 'row')} of {tokens} a step: about "
            f"{count(packed, 'example')}; {count(world.size, 'rank')} x {count(accumulation, 'micro-step')} x "
            f"{count(batch.resolved_micro_rows, 'row')}; strategy {config.strategy.name} on {world.device.type}: "
            f"{describe_strategy(config, world.size)}",
            "steps",
        )
        say(memory, "memory")
        unread = [f"{source.path}: {source.unread_text()}" for source in stats.sources if source.unread]
        notes = [f"fields that nothing reads (number of records): {'; '.join(unread)}"] if unread else []
        for note in (*notes, *data.notes):
            say(note)


def _is_due(num_done: int, every: int | None) -> bool:
    return every is not None and num_done % every == 0


# --- start and end ----------------------------------------------------------------------------------------------------


@contextmanager
def join_ranks(config: RunConfig, stop: StopSignal, console: Console) -> Iterator[World]:
    """Joins the process group, and leaves it at the end; after a failure all ranks end with its text. From here on rank
    0's console speaks.

    A stop signal before the first step ends the block: by then all ranks have agreed, and there is nothing to save.
    """
    require_own_strategy(config.strategy.name)
    world = World.init(stop, config.strategy.timeout_seconds, config.device)
    console.is_main = world.is_main
    restart_peak(world.device)  # an earlier run in this process must not count in this one's peak
    try:
        try:
            with console.watched(lambda: world.status):
                yield world
        except StopRequested:
            stop.name = world.first(stop.name)
            console.print(
                f"stopped by {stop.name} before the first step; nothing is lost. Start the same command again to resume"
            )
        world.close()
    except Exception as error:
        ended = world.fail(error)
        console.log(f"error: {ended}")
        if ended is error:
            raise
        raise ended from error


@contextmanager
def place_of_run(config: RunConfig) -> Iterator[tuple[RunDir, RunLock]]:
    """The run directory and its lock, which `open_run_dir` takes. It is given back after all else has ended: a start
    writes its last lines (page, history, log) under it, so that those of the next one come after them."""
    run_dir = RunDir(Path(config.run_dir))
    lock = RunLock(run_dir.lock, *launched_job())
    try:
        yield run_dir, lock
    finally:
        lock.release()
        run_dir.discard()


def open_run_dir(
    config: RunConfig, place: tuple[RunDir, RunLock], world: World, console: Console, resume: str, fresh: bool = False
) -> tuple[RunDir, RunConfig]:
    """The run directory for its resolved config, locked for this job, and that config.

    Refuses the directory of another run, one in use by another job, and `--resume never` where there is a run. `fresh`
    sets a run that is there aside, except in a start that a launcher repeats.
    """
    run_dir, lock = place

    def open_on_main() -> tuple[str | None, int | str]:
        run_dir.make()
        with os_errors(f"{run_dir.lock}: cannot be written", "Nothing that was saved there has changed"):
            lock.acquire()
        if fresh and not is_repeated_start() and (aside := run_dir.set_aside()) is not None:
            console.print(f"--fresh: the run that was in {run_dir.path} is now in {aside}")
        kept = run_date(config, run_dir), run_dir.eval_rows(config.train)
        run_dir.open(dump_yaml(_with_kept(config, *kept)), free_fields(config))
        if resume == "never":
            run_dir.require_no_checkpoints()
        return kept

    kept = world.from_main(open_on_main)
    return run_dir, _with_kept(config, *kept)  # each rank's own config: whether they are equal is checked later


def run_date(config: RunConfig, run_dir: RunDir) -> str | None:
    """The date that the run's chat template is told: the day of the run's first start.

    None in runs of versions that did not record it.
    """
    if config.data.date is not None:
        return config.data.date
    saved = run_dir.saved_fields()
    return today() if saved is None else saved.get("data.date")


def _with_kept(config: RunConfig, date: str | None, eval_rows: int | str) -> RunConfig:
    """The config with what a run keeps from its first start."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"date": date}),
            "train": config.train.model_copy(update={"eval_rows": eval_rows}),
        }
    )


def report_completed(run_dir: RunDir, console: Console, steps: int) -> TrainState:
    """A finished run that is started again reports so and does nothing."""
    console.print(run_dir.describe_completed(steps))
    return TrainState(step=steps)


def report_stopped(run: Run, state: TrainState) -> TrainState:
    """After a stop signal: what was saved and how to continue. Called by all ranks: they may have received different
    signals."""
    name = run.world.first(run.stop.name)
    run.console.print(
        f"stopped by {name} after step {state.step}; checkpoint saved in {run.dir.checkpoints}. Start the same command "
        "again to resume"
    )
    return replace(state, stopped_by=name)
