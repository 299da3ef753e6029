"""Explains an out-of-memory error: the plan beside the measured bytes, what exceeds it, settings that would fit."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..cluster.world import World
from ..errors import RunFailed
from ..files import format_bytes
from ..memory import choose
from ..model import held_bytes
from ..model.lora import trainable_parameters
from .fit_memory import NUM_ADVICE, Fit, Progress
from .metrics import peak_bytes
from .step import TrainingModel

NOTICEABLE = 64 * 2**20  # bytes by which an item must exceed its plan to be reported


@contextmanager
def explain_out_of_memory(fit: Fit, world: World) -> Iterator[Progress]:
    """Turns this rank's torch.OutOfMemoryError into RunFailed, which ends it; the launcher then ends the others."""
    progress = Progress()
    try:
        yield progress
    except torch.OutOfMemoryError as error:
        held = {} if progress.model is None else bytes_by_kind(progress.model)
        text = explain(fit, held, peak_bytes(world.device), world.size)
        raise RunFailed(
            f"{progress.place}, rank {world.rank} ({socket.gethostname()}): out of GPU memory: "
            f"{str(error).splitlines()[0]}\n{text}"
        ) from error


def bytes_by_kind(model: TrainingModel) -> dict[str, int]:
    """Bytes that persist across steps on this rank, by the plan's kinds of items."""
    trained = list(trainable_parameters(model.module).values())
    has_adapters = any("lora_" in name for name, _ in model.module.named_parameters())
    return {
        "base": held_bytes(model.module) if has_adapters else 0,
        "adapters": sum(parameter.nbytes for parameter in trained),
        "gradients": sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None),
    }


PLAN_KINDS = {
    "base": ("base", "quantization constants", "embeddings, head, norms"),
    "adapters": ("adapters", "weights"),
    "gradients": ("gradients",),
}


def explain(fit: Fit, held: dict[str, int], peak: int, world_size: int) -> str:
    """The plan beside the measured bytes, item by item; what exceeds it; the cheapest settings that would fit.

    `held` comes from `bytes_by_kind` (empty before there is a model); `peak` is the peak of all tensors, bytes.
    """
    plan = fit.plan
    planned = {
        kind: sum(plan.items[name].size for name in names if name in plan.items) for kind, names in PLAN_KINDS.items()
    }
    rest = "activations and the rest"  # optimizer states that are not paged, workspaces
    planned[rest] = max(0, plan.tensor_bytes - sum(planned.values()))
    found = dict(held)
    if held:
        found[rest] = max(0, peak - sum(held.values()))
    lines = [f"peak of tensors {format_bytes(peak)}, planned {format_bytes(plan.tensor_bytes)}:"]
    for kind, size in planned.items():
        measured = format_bytes(found[kind]) if kind in found else "?"
        lines.append(f"  {kind:<27}{measured:>11}, planned {format_bytes(size):>11}")
    grown = [kind for kind, size in found.items() if size > planned[kind] + NOTICEABLE]
    if grown:
        lines.append(f"items that exceed the plan: {', '.join(grown)}")
    elif found:
        lines.append("no item exceeds the plan: memory of other processes, or fragmentation; check nvidia-smi, and set "
                     "PYTORCH_ALLOC_CONF=expandable_segments:True")  # fmt: skip
    lines.append("the cheapest settings that would fit:")
    advice = cheapest_settings(fit, peak, world_size)
    return "\n".join([*lines, *(f"  {line}" for line in advice[:NUM_ADVICE])])


def cheapest_settings(fit: Fit, peak: int, world_size: int) -> tuple[str, ...]:
    """The plan's advice for a device smaller by what the plan missed, and too small for the current settings."""
    plan = fit.plan
    limit = plan.peak_bytes - plan.pageable_bytes - 1  # these settings did not fit, whatever the plan says
    if plan.device_bytes is not None:
        limit = min(limit, plan.device_bytes - max(0, peak - plan.tensor_bytes))
    return choose(fit.config, fit.shapes, world_size=world_size, device_bytes=limit).advice
