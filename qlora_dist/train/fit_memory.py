"""What fits in memory: what `auto` stands for, and the longest micro-batch first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cluster.world import World
from ..config import RunConfig
from ..errors import UserError
from ..files import format_bytes
from ..memory import MemoryPlan, ModelShapes, choose, plan_memory, with_shards
from ..memory.constants import CONTEXT_BYTES, state_bytes
from ..memory.read_shapes import read_shapes
from ..memory.table import shortfall, summary_lines
from ..optim.deepspeed_config import STAGES
from .metrics import peak_bytes
from .run import Run, TrainState
from .step import TrainingModel, try_batch

NUM_ADVICE = 3
QUARTER = 2**28


@dataclass(frozen=True)
class Fit:
    """A config without `auto`, and the reasons."""

    config: RunConfig
    shapes: ModelShapes
    plan: MemoryPlan
    messages: str

    @property
    def text(self) -> str:
        """For the start of a run: what was chosen, and a short plan."""
        config = self.config
        found = f"memory.recompute={config.memory.recompute} batch.micro_rows={config.batch.micro_rows}"
        planned = [] if self.shapes.unknown else summary_lines(self.plan)
        return "; ".join([self.messages or found, *planned])


def resolve_auto(config: RunConfig, world: World) -> Fit:
    """Replaces `auto` in memory.recompute, batch.micro_rows and strategy.shard_over by what the memory plan says fits
    on the smallest GPU.

    All ranks reach the same result: the plan is a pure function of the config and of the least memory of any rank.
    Raises UserError, with settings that would fit, when the tensors alone do not fit. The plan's allowance for
    fragmentation may be too large, so a run that fits without it gets a warning and is tried.
    """
    shapes = read_shapes(config.model.name, config.model.revision)
    device_bytes = usable_bytes(world)
    config = with_shards(
        config, shapes, world_size=world.size, node_ranks=world.node_ranks(), device_bytes=device_bytes
    )
    if shapes.unknown:
        return _unplanned(config, shapes, world, device_bytes)
    if device_bytes is None:
        plan = plan_memory(config, shapes, world_size=world.size, device_bytes=None)
        why = f"the memory of a {world.device.type} is not planned"
    else:
        plan = choose(config, shapes, world_size=world.size, device_bytes=device_bytes)
        why = f"the fastest that fits in {format_bytes(device_bytes)}" if plan.fits else "the least memory"
    is_free = {
        "memory.recompute": config.memory.recompute == "auto",
        "batch.micro_rows": config.batch.micro_rows == "auto",
    }
    values = {"memory.recompute": _layers(plan), "batch.micro_rows": plan.micro_rows}
    chosen = [f"{name}={values[name]}" for name, free in is_free.items() if free]
    messages = [f"{' '.join(chosen)} ({why})"] if chosen else []
    if plan.fits is False:
        remedy = "to make it fit: " + "; ".join(plan.advice[:NUM_ADVICE])
        if plan.is_hopeless and shapes.is_exact:
            raise UserError(f"the run needs more memory than a GPU has here: {shortfall(plan)}; {remedy}")
        messages.append(f"according to the memory plan this run does not fit; {remedy}")
    return Fit(_with_values(config, plan), shapes, plan, "; ".join(messages))


def _unplanned(config: RunConfig, shapes: ModelShapes, world: World, device_bytes: int | None) -> Fit:
    """A model with a kind of layer that the plan does not know: auto is the least memory, and what needs the most is
    tried before the first step."""
    plan = plan_memory(config, shapes, world_size=world.size, device_bytes=device_bytes)
    resolved = _with_values(config, plan)
    if config.train.longest_first is None:
        resolved = resolved.model_copy(update={"train": config.train.model_copy(update={"longest_first": True})})
    tried = "" if resolved.train.longest_first is False else "; the longest micro-batch is tried before the first step"
    message = (
        f"warning: the memory of this model is not planned ({shapes.unknown}), and whether it fits is not known: "
        f"memory.recompute={resolved.memory.recompute} batch.micro_rows={resolved.batch.micro_rows}{tried}"
    )
    return Fit(resolved, shapes, plan, message)


def _with_values(config: RunConfig, plan: MemoryPlan) -> RunConfig:
    """The config with the plan's recompute level and micro-batch."""
    return config.model_copy(
        update={
            "memory": config.memory.model_copy(update={"recompute": _layers(plan)}),
            "batch": config.batch.model_copy(update={"micro_rows": plan.micro_rows}),
        }
    )


def _layers(plan: MemoryPlan) -> int | str:
    return {0: "none", plan.num_layers: "full"}.get(plan.recompute, plan.recompute)


def usable_bytes(world: World) -> int | None:
    """Device memory available to the rank with the least, CUDA context included; None without a GPU."""
    own = float("inf")
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        # without what other processes hold; our own context is already counted as used
        own = min(total, free + torch.cuda.memory_reserved(world.device) + CONTEXT_BYTES)
        own = min(own, total * torch.cuda.get_per_process_memory_fraction(world.device) + CONTEXT_BYTES)
    least = -world.max(-own)
    # in quarters of a GiB: a few MiB more or less at another start must not change the micro-batch
    return None if least == float("inf") else int(least // QUARTER * QUARTER)


@dataclass
class Progress:
    """Where the run is, for the message."""

    place: str = "loading the model"
    model: TrainingModel | None = None


# --- the longest micro-batch first ------------------------------------------------------------------------------------


def try_longest(run: Run, model: TrainingModel, state: TrainState, progress: Progress) -> None:
    """Runs the longest remaining micro-batch without an update: what does not fit fails now, not after a night."""
    world, wanted = run.world, run.config.train.longest_first
    if not (world.device.type == "cuda" if wanted is None else wanted) or state.step >= run.num_steps:
        return
    batch = run.data.loader.longest_batch(state.step, run.num_steps)
    progress.place = f"the longest micro-batch ({batch.num_tokens:,} tokens), before step {state.step + 1}"
    try_batch(world, model, batch, 0 if state.step else states_to_come(run.config, model))
    run.console.print(
        f"the longest micro-batch of the run fits: {batch.num_tokens:,} tokens, peak "
        f"{format_bytes(world.max(peak_bytes(world.device)))}"
    )


def states_to_come(config: RunConfig, model: TrainingModel) -> int:
    """Bytes that the first update adds on the device. Paged states move to the host when the device is full, and
    DeepSpeed has allocated its states already."""
    if config.optim.name.startswith("paged") or config.strategy.name in STAGES:
        return 0
    return sum(state_bytes(config.optim.name, model.num_trainable_parameters))
