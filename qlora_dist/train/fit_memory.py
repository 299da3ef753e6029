"""Does this run fit: what `auto` stands for, the longest micro-batch first, and what an out-of-memory error means."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .. import model as base_model
from ..cluster.world import World
from ..config import RunConfig
from ..errors import RunFailed, UserError
from ..files import GIB
from ..memory import MemoryPlan, ModelShapes, choose, plan_memory
from ..memory.constants import CONTEXT_BYTES, state_bytes
from ..memory.read_shapes import read_shapes
from ..memory.table import shortfall, summary_lines
from ..model import lora as adapters
from .metrics import Metrics, peak_bytes
from .run_dir import TrainState
from .setup import Data
from .step import Learner, try_batch

NOTICEABLE = 64 * 2**20  # bytes by which an item must exceed its plan to be named
NUM_ADVICE = 3
QUARTER = 2**28


@dataclass(frozen=True)
class Fit:
    """A config without `auto`, and why it is so."""

    config: RunConfig
    shapes: ModelShapes
    plan: MemoryPlan
    said: str

    @property
    def text(self) -> str:
        """For the start of a run: what was chosen, and the plan in a few lines."""
        return self.said + "".join(f"\n{line}" for line in summary_lines(self.plan))


def settle(config: RunConfig, world: World) -> Fit:
    """Replaces `auto` in memory.recompute and batch.micro_rows by what the memory plan says fits on the smallest GPU.

    All ranks come to the same: the plan is a pure function of the config and of the least memory that any rank has.
    Raises UserError, with what would fit, when the tensors alone have no room; what the plan adds for fragments may be
    too much, so a run that fits without it is warned and tried.
    """
    shapes = read_shapes(config.model.name, config.model.revision)
    device_bytes = usable_bytes(world)
    if device_bytes is None:
        plan = plan_memory(config, shapes, world_size=world.size, device_bytes=None)
        why = f"the memory of a {world.device.type} is not planned"
    else:
        plan = choose(config, shapes, world_size=world.size, device_bytes=device_bytes)
        why = (
            f"of the settings that fit in {device_bytes / GIB:.2f} GiB the fastest" if plan.fits else "the least memory"
        )
    is_free = {
        "memory.recompute": config.memory.recompute == "auto",
        "batch.micro_rows": config.batch.micro_rows == "auto",
    }
    values = {"memory.recompute": _layers(plan), "batch.micro_rows": plan.micro_rows}
    chosen = [f"{name}={values[name]}" for name, free in is_free.items() if free]
    said = [f"{' '.join(chosen)} ({why})"] if chosen else []
    if plan.fits is False:
        what_would = "what would: " + "; ".join(plan.advice[:NUM_ADVICE])
        if plan.is_hopeless and shapes.is_exact:
            raise UserError(f"the run needs more memory than a GPU here has: {shortfall(plan)}; {what_would}")
        said.append(f"by the memory plan this run does not fit; {what_would}")
    settled = config.model_copy(
        update={
            "memory": config.memory.model_copy(update={"recompute": values["memory.recompute"]}),
            "batch": config.batch.model_copy(update={"micro_rows": plan.micro_rows}),
        }
    )
    return Fit(settled, shapes, plan, "".join(f"\n{line}" for line in said))


def _layers(plan: MemoryPlan) -> int | str:
    return {0: "none", plan.num_layers: "full"}.get(plan.recompute, plan.recompute)


def usable_bytes(world: World) -> int | None:
    """Device memory that the rank with the least of it can have, CUDA context included; None without a GPU."""
    own = float("inf")
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        # what others hold on this card is not ours; our own context is already counted as used
        own = min(total, free + torch.cuda.memory_reserved(world.device) + CONTEXT_BYTES)
        own = min(own, total * torch.cuda.get_per_process_memory_fraction(world.device) + CONTEXT_BYTES)
    least = -world.max(-own)
    # whole quarters of a GiB: a few MiB more or less at another start must not choose another micro-batch
    return None if least == float("inf") else int(least // QUARTER * QUARTER)


@dataclass
class Progress:
    """Where the run is, for the message."""

    place: str = "loading the model"
    learner: Learner | None = None


# --- the longest micro-batch first ------------------------------------------------------------------------------------


def try_longest(
    config: RunConfig,
    world: World,
    learner: Learner,
    data: Data,
    state: TrainState,
    num_steps: int,
    progress: Progress,
    metrics: Metrics,
) -> None:
    """Runs the longest micro-batch that is left, without an update: what does not fit ends now, not after a night."""
    wanted = config.train.longest_first
    if not (world.device.type == "cuda" if wanted is None else wanted) or state.step >= num_steps:
        return
    batch = data.loader.longest_batch(state.step, num_steps)
    progress.place = f"the longest micro-batch ({batch.num_tokens:,} tokens), before step {state.step + 1}"
    try_batch(world, learner, batch, 0 if state.step else states_to_come(config, learner))
    metrics.say(
        f"the longest micro-batch of the run fits: {batch.num_tokens:,} tokens, peak "
        f"{world.max(peak_bytes(world.device)) / GIB:.2f} GiB"
    )


def states_to_come(config: RunConfig, learner: Learner) -> int:
    """Bytes that the first update adds on the device. Paged states go to the host where there is no room."""
    if config.optim.name.startswith("paged"):
        return 0
    return sum(state_bytes(config.optim.name, learner.num_trainable_parameters))


# --- out of memory ----------------------------------------------------------------------------------------------------


@contextmanager
def explaining_out_of_memory(fit: Fit, world: World) -> Iterator[Progress]:
    """Turns torch.OutOfMemoryError of this rank into RunFailed, which ends it; its launcher then ends the others."""
    progress = Progress()
    try:
        yield progress
    except torch.OutOfMemoryError as error:
        held = {} if progress.learner is None else held_bytes(progress.learner)
        text = explain(fit, progress.place, held, peak_bytes(world.device), world.size)
        raise RunFailed(
            f"{progress.place}, rank {world.rank} ({socket.gethostname()}): out of GPU memory: "
            f"{str(error).splitlines()[0]}\n{text}"
        ) from error


def held_bytes(learner: Learner) -> dict[str, int]:
    """Bytes of what stays over a step, on this rank, by the plan's kinds of items."""
    trained = list(adapters.trainable_parameters(learner.model).values())
    return {
        "base": base_model.held_bytes(learner.model) if learner.base_checksum is not None else 0,
        "adapters": sum(parameter.nbytes for parameter in trained),
        "gradients": sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None),
    }


PLAN_KINDS = {
    "base": ("base", "quantization constants", "embeddings, head, norms"),
    "adapters": ("adapters", "weights"),
    "gradients": ("gradients",),
}


def explain(fit: Fit, place: str, held: dict[str, int], peak: int, world_size: int) -> str:
    """The plan beside what was found, item by item; what grew beyond it; the cheapest settings that would fit.

    `held` is from `held_bytes` (empty before there is a model), `peak` the most that tensors took, bytes.
    """
    plan = fit.plan
    planned = {
        kind: sum(plan.items[name].size for name in names if name in plan.items) for kind, names in PLAN_KINDS.items()
    }
    rest = "activations and the rest"  # optimizer states that are not paged, work space
    planned[rest] = max(0, plan.tensor_bytes - sum(planned.values()))
    found = dict(held)
    if held:
        found[rest] = max(0, peak - sum(held.values()))
    lines = [f"peak of tensors {peak / GIB:.2f} GiB, planned {plan.tensor_bytes / GIB:.2f} GiB:"]
    for kind, size in planned.items():
        measured = f"{found[kind] / GIB:8.2f}" if kind in found else "       ?"
        lines.append(f"  {kind:<27}{measured} GiB, planned {size / GIB:8.2f} GiB")
    grown = [kind for kind, size in found.items() if size > planned[kind] + NOTICEABLE]
    if grown:
        lines.append(f"beyond the plan: {', '.join(grown)}")
    elif found:
        lines.append("no item is beyond the plan: memory that is not this run's, or fragments; see nvidia-smi, and set "
                     "PYTORCH_ALLOC_CONF=expandable_segments:True")  # fmt: skip
    lines.append("the cheapest settings that would fit:")
    advice = cheapest_settings(fit, peak, world_size)
    return "\n".join([*lines, *(f"  {line}" for line in advice[:NUM_ADVICE])])


def cheapest_settings(fit: Fit, peak: int, world_size: int) -> tuple[str, ...]:
    """The plan's advice for a device smaller by what the plan missed, so small that these settings do not fit."""
    plan = fit.plan
    limit = plan.peak_bytes - plan.pageable_bytes - 1  # these settings did not fit, whatever the plan says
    if plan.device_bytes is not None:
        limit = min(limit, plan.device_bytes - max(0, peak - plan.tensor_bytes))
    return choose(fit.config, fit.shapes, world_size=world_size, device_bytes=limit).advice
