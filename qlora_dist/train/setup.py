"""The parts of a run that happen once: each takes the config and makes one thing of it. `train` calls them in order."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import model as base_model
from ..cluster.launcher import launched_job, require_own_strategy
from ..cluster.run_lock import RunLock
from ..cluster.stop_signal import StopRequested, StopSignal
from ..cluster.world import World
from ..config import DataConfig, RunConfig, SourceConfig, dump_yaml
from ..data.documents import Documents, build_documents, split_sources
from ..data.loader import Loader, StepRows, derive_accumulation, eval_batches
from ..data.packing import Batch, Rows, one_document_per_row, pack_best_fit
from ..errors import RunFailed, UserError
from ..files import GIB
from ..memory import MemoryPlan
from ..model import lora as adapters
from ..model.activation_offload import ActivationOffload
from ..optim.adamw import lr_at
from . import check_start as preflight
from .checks import (
    check_base_bytes,
    check_ends_are_learned,
    check_every_step_has_labels,
    check_source_bits,
    promised_base_bytes,
)
from .metrics import peak_bytes, restart_peak
from .run_dir import RunDir, StepStats, TrainState
from .step import Learner
from .strategy import build_update, check_update, describe_strategy, load_device


@dataclass
class Data:
    """What is learned and what is held out."""

    documents: Documents
    rows: Rows
    loader: Loader
    held_out: list[Batch]  # this rank's


@contextmanager
def join(config: RunConfig, stop: StopSignal) -> Iterator[World]:
    """This process's place among the ranks; left in order at the end, and left to the launcher after a failure.

    A stop signal before the first step ends the block: all ranks have agreed then, and there is nothing to save.
    """
    others = [name for name in config.logging.trackers if name != "tensorboard"]
    require_own_strategy(config.strategy.name)
    world = World.init(others, config.run_dir, stop, config.strategy.timeout_seconds)
    restart_peak(world.device)  # an earlier run in this process is neither planned nor measured with this one
    try:
        yield world
    except RunFailed:
        raise
    except RuntimeError as error:
        raise world.explained(error) from error
    except StopRequested:
        stop.name = world.first(stop.name)
        if world.is_main:
            print(
                f"stopped by {stop.name} before the first step; nothing is lost. Start the same command again to go on"
            )
    world.close()


@contextmanager
def open_run(config: RunConfig, world: World, resume: str) -> Iterator[RunDir]:
    """The run directory with its resolved config, for this job alone.

    Refuses another run's, one that another job is at work in, and `--resume never` where there is a run.
    """
    run = RunDir(Path(config.run_dir))
    lock = RunLock(run.path, *launched_job())

    def open_on_main() -> None:
        run.make()
        lock.acquire()
        run.open(dump_yaml(config), free_fields(config))
        if resume == "never" and run.checkpoints.is_dir() and any(run.checkpoints.glob("step-*")):
            raise UserError(
                f"--resume never, but {run.checkpoints} holds checkpoints; remove {run.path}, choose another "
                "run_dir, or use --resume auto to go on"
            )

    try:
        world.from_main(open_on_main)
        yield run
    finally:
        lock.release()


def free_fields(config: RunConfig) -> tuple[str, ...]:
    """What may change between two starts of this run, besides train.run_dir.FREE_FIELDS."""
    # with a constant rate the length of a run changes nothing in its steps: it may be extended
    return ("train.steps", "train.epochs") if config.optim.schedule == "constant" else ()


def say_completed(run: RunDir, world: World, steps: int) -> TrainState:
    """A finished run that is started again says so and does nothing."""
    if world.is_main:
        print(f"{run.path}: this run is finished ({steps} steps, see {run.summary}); nothing to do")
    return TrainState(step=steps)


def check(config: RunConfig, world: World, run: RunDir, plan: MemoryPlan) -> None:
    """What can be known before data or weights are read: same config and code on all ranks, batch, model kind, targets,
    devices, network, disk. Rank 0 says where the run starts."""
    world.require_equal(dump_yaml(config), "the resolved config")
    derive_accumulation(config.batch.rows_per_step, config.batch.settled_rows, world.size)
    check_update(config, world)
    check_model(config, world)
    started = preflight.check_start(
        world,
        run.path,
        checkpoint_bytes=preflight.checkpoint_bytes(plan.trainable_parameters, config.optim.name),
        keep=config.train.keep,
        allow_mixed=config.strategy.mixed_devices,
    )
    if world.is_main:
        print(started, flush=True)


def check_model(config: RunConfig, world: World) -> base_model.ModelFacts:
    """What config.json alone says about the model. Raises UserError when it cannot be trained as asked."""
    return base_model.check_config(
        config.model.name,
        revision=config.model.revision,
        quantization=config.model.quantization,
        target_modules="all-linear" if config.lora is None else config.lora.target_modules,
        row_tokens=config.data.row_tokens,
        device_type=world.device.type,
        weights=config.model.weights,
    )


def build_data(config: RunConfig, world: World) -> Data:
    """Sources -> documents -> rows -> loader. The first rank of each node tokenizes; the others read its cache."""
    tokenizer = base_model.load_tokenizer(config.model.name, config.model.revision)
    train_sources, eval_sources = split_sources(config.data.train, config.data.eval)
    documents = build_source_documents(config.data, train_sources, tokenizer, world, "data.train", config.seed)
    if config.data.require_eos:
        check_ends_are_learned(documents, tokenizer, config.seed)
    rows = build_rows(config.data, documents, config.seed)
    loader = Loader(
        documents,
        rows,
        rows_per_step=config.batch.rows_per_step,
        micro_rows=config.batch.settled_rows,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        total_rows=None if config.train.epochs is None else max(1, round(config.train.epochs * len(rows))),
    )
    held_out = []
    if eval_sources:
        unseen = build_source_documents(config.data, eval_sources, tokenizer, world, "data.eval", config.seed)
        unseen_rows = build_rows(config.data, unseen, config.seed)
        held_out = eval_batches(unseen, unseen_rows, config.batch.settled_rows, world.rank, world.size)
    return Data(documents, rows, loader, held_out)


def build_source_documents(
    data: DataConfig, sources: Sequence[SourceConfig], tokenizer: Any, world: World, what: str, seed: int
) -> Documents:
    """Tokenized documents, the same on every rank. The store's lock also keeps other jobs from building them twice."""
    with world.stoppable(f"preparing {what}"), world.local_main_first(f"preparing {what}"):
        documents = build_documents(
            sources,
            tokenizer,
            row_tokens=data.row_tokens,
            on_long=data.on_long,
            on_bad=data.on_bad,
            learn=data.learn,
            template=data.template,
            cache_dir=data.cache_dir,
            seed=seed,
            num_workers=data.num_workers,
        )
    world.require_equal(documents.fingerprint, what)
    return documents


def build_rows(data: DataConfig, documents: Documents, seed: int) -> Rows:
    """Documents -> rows, packed or one document each."""
    if data.packing:
        return pack_best_fit(documents.lengths, data.row_tokens, seed)
    return one_document_per_row(documents.lengths, data.row_tokens)


def count_steps(config: RunConfig, data: Data) -> int:
    """Number of optimizer updates of the whole run."""
    steps = config.train.steps if config.train.steps is not None else data.loader.num_steps
    assert steps is not None
    check_every_step_has_labels(data.documents, data.rows, data.loader.rows_of_step, steps)
    return steps


def describe(config: RunConfig, world: World, data: Data, num_steps: int) -> str:
    """What is about to run, in one paragraph."""
    batch, stats = config.batch, data.documents.stats
    accumulation = derive_accumulation(batch.rows_per_step, batch.settled_rows, world.size)
    return (
        f"{len(data.documents):,} documents in {len(data.rows):,} rows of up to {config.data.row_tokens:,} tokens "
        f"({data.rows.efficiency:.1%} full; truncated {stats.total('truncated'):,}, dropped {stats.total('dropped'):,}"
        f", bad {stats.total('bad'):,})\n"
        f"{num_steps:,} steps of {batch.rows_per_step} rows = {world.size} ranks x {accumulation} micro-steps x "
        f"{batch.settled_rows} rows; strategy {config.strategy.name} on {world.device.type}: "
        f"{describe_strategy(config, world.size)}"
    )


# --- the learner ------------------------------------------------------------------------------------------------------


def build_learner(config: RunConfig, world: World) -> Learner:
    """Base -> adapters -> what updates them."""
    settings = config.model
    compute_dtype: torch.dtype = getattr(torch, settings.compute_dtype)
    is_full = config.lora is None
    files = _base_files(config, world)
    shards = world.shard_group() if config.strategy.name == "fsdp" else None
    with world.stoppable(f"loading {settings.name}", has_collectives=shards is not None):
        model: torch.nn.Module = base_model.load_base(
            files,
            revision=settings.revision,
            quantization=settings.quantization,
            double_quant=settings.double_quant,
            # full fine-tuning keeps fp32 masters and computes under autocast
            compute_dtype=torch.float32 if is_full else compute_dtype,
            attention=settings.attention,
            attention_dtype=compute_dtype,
            device=load_device(config, world),
            run_device=world.device,
            weights=settings.weights,
            seed=config.seed,
            shards=shards,
            offload=config.strategy.offload,
        )
    if config.lora is None:
        model.requires_grad_(True)
    else:
        model = adapters.attach_lora(
            model,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            target_modules=config.lora.target_modules,
            variant=config.lora.variant,
            seed=config.seed,
            init_from=config.lora.init_from,
            kernels=settings.kernels,
            device=world.device,
        )
    num_base, num_trainable = adapters.count_parameters(model)
    assert config.memory.recompute != "auto", "fit_memory.settle comes first"
    base_model.set_recompute(model, config.memory.recompute)
    model.train()
    head = base_model.output_head(model)
    update = build_update(config, world, model, head.weight)
    offload = ActivationOffload(world.device) if config.memory.offload_activations else None

    @contextmanager
    def computing() -> Iterator[None]:
        with ExitStack() as stack:
            if is_full and compute_dtype != torch.float32:
                stack.enter_context(torch.autocast(world.device.type, compute_dtype))
            if offload is not None:
                stack.enter_context(offload)
            yield

    with computing():  # as a step computes: full fine-tuning has fp32 weights and kernels of 16 bits
        update.run(lambda: base_model.check_head(model))
    base_model.check_gathered_layer(model)
    world.require_equal(update.digest(), "the initial trainable weights")
    return Learner(model, head, update, compute_dtype, computing, num_base, num_trainable)


def _base_files(config: RunConfig, world: World) -> str:
    """What the base is read from: the model, or its 4-bit copy on this node, which the node's first rank makes."""
    settings = config.model
    if settings.cache_4bit is None or settings.weights != "files":
        return settings.name
    with world.local_main_first("making the 4-bit copy of the base"):
        return base_model.cached_4bit(
            settings.cache_4bit,
            settings.name,
            revision=settings.revision,
            quantization=settings.quantization,
            double_quant=settings.double_quant,
            compute_dtype=getattr(torch, settings.compute_dtype),
            device=world.device,
        )


def check_base(config: RunConfig, world: World, learner: Learner) -> str:
    """The base as it lies in memory, before the first step: bytes by rank, bits of one layer. Notes its checksum.

    Says what was compared. Full fine-tuning has no frozen base.
    """
    if config.lora is None:
        return "no frozen base: all weights are trained"
    settings = config.model
    dtype: torch.dtype = getattr(torch, settings.compute_dtype)
    promised = promised_base_bytes(
        settings.name,
        revision=settings.revision,
        quantization=settings.quantization,
        double_quant=settings.double_quant,
        dtype=dtype,
    )
    strategy = config.strategy.name
    expected = promised.on_each_rank(strategy, world.size)
    held = world.gather((socket.gethostname(), base_model.held_bytes(learner.model)))
    check_base_bytes(held, expected, strategy)
    if strategy == "zero3":
        compared = "a gathered layer is not compared with its source: DeepSpeed gathers and drops weights by itself"
    elif strategy == "fsdp":
        compared = "a gathered layer is bit-equal to its quantized source"  # build_learner has checked it
    elif settings.weights != "files":
        compared = "its weights are random, of no file"
    else:
        compared = check_source_bits(
            learner.model, settings.name, revision=settings.revision, compute_dtype=dtype, seed=config.seed
        )
    learner.base_checksum = base_model.base_checksum(learner.model)
    return f"base: {expected / GIB:.2f} GiB on each rank, as {strategy} promises; {compared}"


def scheduled_lr(config: RunConfig, step: int, num_steps: int) -> float:
    """Learning rate of 0-based update `step`."""
    optim = config.optim
    return lr_at(
        step,
        lr=optim.lr,
        schedule=optim.schedule,
        warmup_steps=optim.warmup_steps,
        num_steps=num_steps,
        min_lr_ratio=optim.min_lr_ratio,
    )


def step_values(
    world: World, state: TrainState, stats: StepStats, rows: StepRows, lr: float, seconds: float, data_seconds: float
) -> dict[str, Any]:
    """The line of metrics.jsonl for one update."""
    return {
        "step": state.step,
        "epoch": rows.epoch,
        "loss": stats.loss,
        "lr": lr,
        "grad_norm": stats.grad_norm,
        "num_labels": stats.num_labels,
        "tokens": stats.num_tokens,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "tokens_per_second": stats.num_tokens / (seconds + data_seconds),
        "peak_bytes": peak_bytes(world.device),
        "imbalance": rows.imbalance,
    }


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every N steps happens after this one."""
    return every is not None and step % every == 0
