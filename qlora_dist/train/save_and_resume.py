"""What a run keeps: checkpoints while it runs, and its results at the end."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cluster.stop_signal import StopSignal
from ..cluster.world import World
from ..config import RunConfig, dump_yaml
from ..errors import UserError
from ..files import GIB, DamagedFolder, folder_aside, write_json
from ..memory import MemoryPlan
from ..model import base_checksum, load_tokenizer
from . import checkpoint
from .checks import check_base_unchanged
from .metrics import Metrics, median_tokens_per_second, peak_bytes
from .provenance import commit, device_name, versions
from .run_dir import RunDir, TrainState, config_changes, read_metrics
from .setup import Data, free_fields
from .step import Learner
from .trained_weights import export_trained, load_trained, save_trained, verify_trained


def resume(
    config: RunConfig, run: RunDir, world: World, learner: Learner, data: Data, metrics: Metrics, choice: str
) -> TrainState:
    """Puts weights and optimizer back to the newest checkpoint that verifies (or the one that was named)."""
    world.doing("reading the newest checkpoint")
    path, said = world.from_main(lambda: _choose_checkpoint(config, run, data, choice))
    for line in said:
        metrics.say(line)
    if path is None:
        return TrainState()
    loaded = checkpoint.load_checkpoint(Path(path))
    state = loaded.state
    if state["layout"] != learner.update.layout():
        raise UserError(f"checkpoint {path}: its trained weights have other names or shapes than this config gives")
    with learner.update.whole_weights():
        load_trained(learner.model, Path(path), config.lora is None)
    try:
        learner.update.load_state(loaded.optimizer_tensors, state["optimizer_numbers"])
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}; use the optim.name it was trained with") from None
    return TrainState(state["step"], state["num_tokens"], state["num_labels"])


def _choose_checkpoint(config: RunConfig, run: RunDir, data: Data, choice: str) -> tuple[str | None, list[str]]:
    if choice not in ("auto", "never"):
        path: Path | None = Path(choice)
        try:
            checkpoint.verify_checkpoint(Path(choice))
        except DamagedFolder as error:
            raise UserError(
                f"--resume {choice}: {error}. Give a folder checkpoints/step-*, or --resume auto for the newest good"
            ) from None
        said = []
    else:
        checkpoint.remove_interrupted(run.checkpoints)
        path, rejected = checkpoint.find_newest(run.checkpoints)
        said = [f"rejected {bad.name}: {reason}" for bad, reason in rejected]
        if path is None and rejected:
            raise UserError(
                f"{run.checkpoints}: no checkpoint can be used:\n"
                + "\n".join(f"  {line}" for line in said)
                + f"\nremove {run.path} to start anew, or restore a checkpoint"
            )
    if path is None:
        return None, said
    state = checkpoint.load_state(path)
    changed = config_changes(state["config"], dump_yaml(config), free_fields(config))
    if changed:
        raise UserError(f"checkpoint {path} was made with another config:\n" + "\n".join(changed))
    if state["data_fingerprint"] != data.documents.fingerprint:
        raise UserError(
            f"checkpoint {path} was made with other training data (a source or the tokenizer has changed); restore "
            "the data, or start anew in another run_dir with lora.init_from"
        )
    return str(path), [*said, f"going on from {path} (step {state['step']})"]


def save(config: RunConfig, run: RunDir, world: World, learner: Learner, data: Data, state: TrainState) -> None:
    """A checkpoint of this state, written and verified by rank 0; a failure ends all ranks.

    Weights are read back and compared before the checkpoint gets its name and before an older one is deleted. No rank's
    base may have changed since it was loaded.
    """
    world.doing(f"saving step {state.step}")
    if learner.base_checksum is not None:
        is_changed = base_checksum(learner.model) != learner.base_checksum
        check_base_unchanged(world.gather((socket.gethostname(), is_changed)), f"after step {state.step}")

    def write_weights(folder: Path) -> None:
        save_trained(learner.model, folder, config.model.name, config.lora is None)
        verify_trained(learner.model, folder, config.lora is None)

    tensors, numbers = learner.update.state()  # of all ranks, on rank 0

    def save_on_main() -> None:
        checkpoint.save_checkpoint(
            run.checkpoints,
            state.step,
            write_weights=write_weights,
            optimizer_tensors=tensors,
            state={
                "step": state.step,
                "num_tokens": state.num_tokens,
                "num_labels": state.num_labels,
                "config": dump_yaml(config),
                "data_fingerprint": data.documents.fingerprint,
                "layout": learner.update.layout(),
                "optimizer_numbers": numbers,
                "random": "none stored: order, dropout and learning rate are functions of (seed, step, row)",
                "world_size": world.size,
                "versions": versions(),
            },
            keep=config.train.keep,
        )

    with learner.update.whole_weights():
        world.from_main(save_on_main)


# --- the end ----------------------------------------------------------------------------------------------------------


def say_stopped(run: RunDir, world: World, state: TrainState, stop: StopSignal) -> TrainState:
    """After a stop signal: what was saved and how to go on. Called by all ranks: one may have heard another signal."""
    name = world.first(stop.name)
    if world.is_main:
        print(
            f"stopped by {name} after step {state.step}; checkpoint saved in {run.checkpoints}. Start the same command "
            "again to go on",
            flush=True,
        )
    return replace(state, stopped_by=name)


def finish(
    config: RunConfig,
    run: RunDir,
    world: World,
    learner: Learner,
    data: Data,
    state: TrainState,
    before: dict[str, float],
    metrics: Metrics,
    plan: MemoryPlan,
) -> TrainState:
    """Exports the weights, writes summary.json, and marks the run as completed, in this order."""
    world.doing("writing the results")
    peak = int(world.max(peak_bytes(world.device)))
    build_peak = int(world.max(learner.build_peak_bytes))

    def finish_on_main() -> None:
        _export(config, run, learner)
        summary = _summary(config, run, world, learner, data, state, before, peak, plan)
        write_json(run.summary, summary | {"build_peak_bytes": build_peak})
        run.mark_completed(state.step, config.train.length)

    with learner.update.whole_weights():
        world.from_main(finish_on_main)
    error = f" (planned {plan.tensor_bytes / peak - 1:+.1%})" if world.device.type == "cuda" else ""
    metrics.say(
        f"finished: {state.step} steps, peak {peak / GIB:.2f} GiB{error}; {_exported(config, run)}, {run.summary}"
    )
    return state


def _exported(config: RunConfig, run: RunDir) -> Path:
    return run.path / "model" if config.lora is None else run.adapter


def _export(config: RunConfig, run: RunDir, learner: Learner) -> None:
    with folder_aside(_exported(config, run)) as aside:
        export_trained(learner.model, aside, config.model.name, learner.compute_dtype, config.lora is None)
        load_tokenizer(config.model.name, config.model.revision).save_pretrained(aside)


def _summary(
    config: RunConfig,
    run: RunDir,
    world: World,
    learner: Learner,
    data: Data,
    state: TrainState,
    before: dict[str, float],
    peak: int,
    plan: MemoryPlan,
) -> dict[str, Any]:
    lines = list(read_metrics(run.metrics))
    stats = data.documents.stats
    return {
        **lines[-1],
        **{f"{key}_start": value for key, value in before.items() if key != "eval_seconds"},
        "total_tokens": state.num_tokens,
        "total_labels": state.num_labels,
        "world_size": world.size,
        "strategy": config.strategy.name,
        "micro_rows": config.batch.micro_rows,
        "recompute": config.memory.recompute,
        "device": device_name(world.device),
        "packing_efficiency": data.rows.efficiency,
        "examples": len(data.documents),
        "rows": len(data.rows),
        "truncated": stats.total("truncated"),
        "dropped": stats.total("dropped"),
        "bad": stats.total("bad"),
        "tokens_per_second_median": median_tokens_per_second(run.metrics),
        "peak_bytes_max": peak,
        "planned_peak_bytes": plan.tensor_bytes,
        # a CPU's peak is that of a whole process, which nobody plans
        "plan_error": plan.tensor_bytes / peak - 1 if world.device.type == "cuda" else None,
        "trainable_parameters": learner.num_trainable_parameters,
        "base_parameters": learner.num_base_parameters,
        "versions": versions(),
        "commit": commit(),
    }
