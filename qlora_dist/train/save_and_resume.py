"""What a run keeps: checkpoints while it runs, and its results at the end."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

from ..cluster.provenance import code_digest, commit, device_name, versions
from ..config import dump_yaml
from ..config.changes import config_changes, free_fields, moved_paths
from ..config.run_dir import read_metrics
from ..console import utc_now
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..files import DamagedFolder, folder_aside, format_bytes, write_json
from ..memory import MemoryPlan
from ..model import base_checksum, evaluation_mode, unwrap, write_errors
from ..model.reference_logits import NUM_SAMPLES, SAMPLE_TOKENS, Reference, compute_reference
from . import checkpoint
from .checks.base import check_base_unchanged
from .metrics import median_tokens_per_second, peak_bytes, whole_run
from .prompt_format import PromptFormat, export_tokenizer, record_prompts
from .run import Run, TrainState
from .source_digests import changed_sources
from .step import TrainingModel
from .trained_weights import export_trained, restore_trained, save_trained, verify_trained


def begin(run: Run, model: TrainingModel, choice: str, plan: MemoryPlan) -> TrainState:
    """Resumes, or begins anew where there is nothing. From here on the run is in its directory."""
    state = resume_newest(run, model, choice)
    run.world.from_main(run.dir.begin)
    record_prompts(run)
    of_start = {
        "world_size": run.world.size,
        "host": socket.gethostname(),
        "device": device_name(run.world.device),
        "device_type": run.world.device.type,
        "plan": plan.to_json(),
        "versions": versions(),
    }
    if (said := getattr(unwrap(model.module), "requantized", None)) is not None:
        of_start["base"] = said  # of fp8 and MXFP4 files: what quantizing them again changed
    run.metrics.start(state.step, run.config, **of_start)
    return state


def resume_newest(run: Run, model: TrainingModel, choice: str) -> TrainState:
    """Restores weights and optimizer from the newest checkpoint that verifies (or the one that was named).

    Checkpoints that this leaves behind, damaged or of later steps, are set aside: no later start takes them.
    """
    run.world.set_status("reading the newest checkpoint")
    base = _base_in_memory(run, model)
    path, notes, rejected = run.world.from_main(lambda: _choose_checkpoint(run, choice, base))
    for line in notes:
        run.console.print(line)
    if path is None:
        return TrainState(started=utc_now())
    loaded = checkpoint.load_checkpoint(Path(path))
    state = loaded.state
    if state["layout"] != model.update.layout():
        raise UserError(f"checkpoint {path}: its trained weights have other names or shapes than this config's")
    with model.update.whole_weights(to_write=True):
        restore_trained(model.module, Path(path), run.config.lora is None)
    try:
        model.update.load_state(loaded.optimizer_tensors, state["optimizer_numbers"])
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}; use the optim.name it was trained with") from None
    run.world.from_main(lambda: checkpoint.set_aside_newer(run.dir.checkpoints, Path(path), state["step"], rejected))
    return TrainState(state["step"], state["num_tokens"], state["num_labels"], started=state.get("started"))


def _choose_checkpoint(run: Run, choice: str, base: dict[str, str]) -> tuple[str | None, list[str], dict[str, str]]:
    """(checkpoint, what to say, the newer ones that are damaged by name, with their reasons)."""
    reasons: dict[str, str] = {}
    if choice not in ("auto", "never"):
        path: Path | None = Path(choice)
        try:
            checkpoint.verify_checkpoint(Path(choice))
        except DamagedFolder as error:
            raise UserError(
                f"--resume {choice}: {error}. Give a folder checkpoints/step-*, or --resume auto for the newest good"
            ) from None
        notes: list[str] = []
    else:
        checkpoint.remove_interrupted(run.dir.checkpoints)
        path, rejected = checkpoint.find_newest(run.dir.checkpoints)
        reasons = {bad.name: reason for bad, reason in rejected}
        notes = [f"rejected {name}: {reason}" for name, reason in reasons.items()]
        if path is None and rejected:
            raise UserError(
                f"{run.dir.checkpoints}: no checkpoint can be used:\n"
                + "\n".join(f"  {line}" for line in notes)
                + f"\nremove {run.dir.path} to start over, or restore a checkpoint"
            )
    if path is None:
        return None, notes, reasons
    state = checkpoint.load_state(path)
    moved = _require_same(run, path, state, base)
    if moved:
        notes = [*notes, f"other paths than before, with the same content: {', '.join(moved)}"]
    return str(path), [*notes, f"resuming from {path} (step {state['step']})"], reasons


def _require_same(run: Run, path: Path, state: dict[str, Any], base: dict[str, str]) -> list[str]:
    """Raises UserError unless config, data, and all that is named by a path are those of the checkpoint.

    Returns the fields that name the same content by another path.
    """
    saved_config, config = state["config"], dump_yaml(run.config)
    # fields whose content this checkpoint tells: versions before recorded less
    recorded = ("data.train", "data.template", *state.get("sources", {}))
    recorded += ("data.eval",) if "eval_fingerprint" in state else ()
    changed = config_changes(saved_config, config, free_fields(run.config), f"{path}: its config", recorded)
    if changed:
        raise UserError(f"checkpoint {path} was made with another config:\n" + "\n".join(changed))
    if state["data_fingerprint"] != run.data.documents.fingerprint:
        raise UserError(
            f"checkpoint {path} was made with other training data (a source or the tokenizer has changed); restore "
            "the data, or start over in another run_dir with lora.init_from"
        )
    if state.get("eval_fingerprint", run.data.held_out_fingerprint) != run.data.held_out_fingerprint:
        raise UserError(
            f"checkpoint {path} was made with other held-out data behind data.eval (or hold_out): its evaluations "
            "could not be compared with those that follow. Restore the data; to evaluate on other data, finish this "
            "run and use `qlora-dist evaluate --config`, or start over in another run_dir with lora.init_from"
        )
    changed = changed_sources(state.get("sources", {}), run.sources)
    saved = state.get("base_in_memory", base)  # versions before did not record it
    if not changed and saved.get("made_by") == base["made_by"] and saved.get("checksum") != base["checksum"]:
        changed = ["  model.name: the loaded base has other bits than the one that was trained on"]
    if changed:
        raise UserError(
            f"checkpoint {path} was made with other files behind the same names:\n"
            + "\n".join(changed)
            + "\nrestore them, or start over in another run_dir with lora.init_from"
        )
    return moved_paths(saved_config, config)


def _base_in_memory(run: Run, model: TrainingModel) -> dict[str, str]:
    """A checksum of all ranks' bases, and what decides how they lie in memory: only then are two comparable."""
    settings, strategy, device = run.config.model, run.config.strategy, device_name(run.world.device)
    shards = f"{strategy.name} over {strategy.shard_ranks(run.world.size)}, offload {strategy.offload}"
    layout = f"{shards}, {run.world.size} ranks, {device}, {settings.cache_4bit}"
    checksums = run.world.gather(model.base_checksum)
    if strategy.name == "zero3":
        checksums = []  # DeepSpeed pads its partitions with whatever was in memory
    return {
        "made_by": f"{layout}, code {code_digest()}, {versions()}",
        "checksum": hashlib.sha256(repr(checksums).encode()).hexdigest(),
    }


def save(run: Run, model: TrainingModel, state: TrainState) -> None:
    """Writes a checkpoint of this state on rank 0; a failure ends all ranks.

    Weights are read back and compared before the checkpoint gets its name and before an older one is deleted. Fails
    when any rank's base has changed since it was loaded.
    """
    config, world = run.config, run.world
    world.set_status(f"saving step {state.step}")
    if model.base_checksum is not None:
        is_changed = base_checksum(model.module) != model.base_checksum
        check_base_unchanged(world.gather((socket.gethostname(), is_changed)), f"after step {state.step}")

    def write_weights(folder: Path) -> None:
        save_trained(model.module, folder, config.model.name, config.lora is None)
        verify_trained(model.module, folder, config.lora is None)

    tensors, numbers = model.update.state()  # whole, on rank 0
    base = _base_in_memory(run, model)

    def save_on_main() -> None:
        run.dir.require_present()
        checkpoint.save_checkpoint(
            run.dir.checkpoints,
            state.step,
            write_weights=write_weights,
            optimizer_tensors=tensors,
            state={
                "step": state.step,
                "num_tokens": state.num_tokens,
                "num_labels": state.num_labels,
                "started": state.started,
                "config": dump_yaml(config),
                "data_fingerprint": run.data.documents.fingerprint,
                "eval_fingerprint": run.data.held_out_fingerprint,
                "sources": run.sources,
                "base_in_memory": base,
                "layout": model.update.layout(),
                "optimizer_numbers": numbers,
                "random": "none stored: order, dropout and learning rate are functions of (seed, step, row)",
                "world_size": world.size,
                "versions": versions(),
            },
            keep=config.train.keep,
        )

    with model.update.whole_weights():
        world.from_main(save_on_main)
    run.metrics.page.draw()


# --- the end ----------------------------------------------------------------------------------------------------------


def finish(
    run: Run, model: TrainingModel, state: TrainState, at_start: dict[str, float], plan: MemoryPlan
) -> TrainState:
    """Exports the weights, writes summary.json, and marks the run as completed, in this order."""
    config, world = run.config, run.world
    world.set_status("writing the results")
    peak = int(world.max(peak_bytes(world.device)))
    build_peak = int(world.max(model.build_peak_bytes))
    target = run.dir.model if config.lora is None else run.dir.adapter
    reference = None if config.lora is None else _reference(run, model)

    def finish_on_main() -> None:
        run.dir.require_present()
        with folder_aside(target) as aside:
            export_trained(model.module, aside, config.model.name, model.compute_dtype, config.lora is None)
            prompts = PromptFormat.read(run.dir.path)
            tokenizer = load_tokenizer(config.model.name, config.model.revision)
            export_tokenizer(aside, unwrap(model.module), tokenizer, prompts)
            if prompts is not None and config.lora is not None:
                prompts.write(aside)  # an adapter may leave its run
        if reference is not None:
            reference.save(run.dir.reference, target)
        write_json(run.dir.summary, _summary(run, model, state, at_start, plan, peak, build_peak))
        run.metrics.page.finished()
        run.dir.mark_completed(state.step, config.train.length)

    def finish_or_explain() -> None:
        with write_errors(
            f"the results could not be written to {run.dir.path}",
            "All steps are done and the last checkpoint is whole: the same command writes them again",
        ):
            finish_on_main()

    with model.update.whole_weights():
        world.from_main(finish_or_explain)
    error = f" (planned {plan.tensor_bytes / peak - 1:+.1%})" if world.device.type == "cuda" else ""
    run.console.print(f"finished: {state.step} steps, peak {format_bytes(peak)}{error}; {target}, {run.dir.summary}")
    return state


def _reference(run: Run, model: TrainingModel) -> Reference:
    """Logits on the beginnings of the first training documents. Called by all ranks."""
    documents = run.data.documents
    samples = [documents[index].input_ids[:SAMPLE_TOKENS].tolist() for index in range(min(NUM_SAMPLES, len(documents)))]
    with evaluation_mode(model.module):
        return model.update.forward(lambda: compute_reference(samples, model.logits, run.world.device))


def _summary(
    run: Run,
    model: TrainingModel,
    state: TrainState,
    at_start: dict[str, float],
    plan: MemoryPlan,
    peak: int,
    build_peak: int,
) -> dict[str, Any]:
    lines = list(read_metrics(run.dir.metrics))
    data = run.data
    stats = data.documents.stats
    return {
        **(lines[-1] if lines else {}),
        **{f"{key}_start": value for key, value in at_start.items() if key != "eval_seconds"},
        **whole_run(lines, at_start),
        "started": state.started,
        "ended": utc_now(),
        "total_tokens": state.num_tokens,
        "total_labels": state.num_labels,
        "world_size": run.world.size,
        "strategy": run.config.strategy.name,
        "micro_rows": run.config.batch.micro_rows,
        "recompute": run.config.memory.recompute,
        "device": device_name(run.world.device),
        "packing_efficiency": data.rows.efficiency,
        "examples": len(data.documents),
        "rows": len(data.rows),
        "truncated": stats.total("truncated"),
        "dropped": stats.total("dropped"),
        "bad": stats.total("bad"),
        "tokens_per_second_median": median_tokens_per_second(run.dir.metrics),
        "peak_bytes_max": peak,
        "build_peak_bytes": build_peak,
        "planned_peak_bytes": plan.tensor_bytes,
        # the peak on a CPU is that of the whole process, which is not planned
        "plan_error": plan.tensor_bytes / peak - 1 if run.world.device.type == "cuda" else None,
        "trainable_parameters": model.num_trainable_parameters,
        "base_parameters": model.num_base_parameters,
        "sources": run.sources,
        "versions": versions(),
        "commit": commit(),
    }
