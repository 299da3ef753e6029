"""What the launcher (accelerate, torchrun, srun, Slurm) sets in the environment. Before any process group exists."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, shortened
from .stop_signal import parent_at_start


class Ranks(NamedTuple):
    """This process among the ranks, as its launcher says; without a launcher the only one."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this node


def launched_ranks() -> Ranks:
    """Raises UserError for variables of the launcher that are not numbers, or that contradict each other."""
    size = _number("WORLD_SIZE", 1, least=1)
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    local_size = _number("LOCAL_WORLD_SIZE", size, least=1)
    if size > 1 and "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE={size} but RANK is not set; {_LAUNCH}")
    for name, value, of, total in (
        ("RANK", rank, "WORLD_SIZE", size),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size),
    ):
        if of in os.environ and value >= total:
            raise UserError(f"{name}={value} but {of}={total}: expected 0 to {total - 1}; {_LAUNCH}")
    return Ranks(rank, size, local_rank, local_size)


def meeting_place() -> tuple[str, int, bool]:
    """Host and port of the store where the ranks meet, and whether the launcher already serves it. Raises UserError."""
    address = os.environ.get("MASTER_ADDR", "")
    if not address or "MASTER_PORT" not in os.environ:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise UserError(f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} but {missing} is not set; {_LAUNCH}")
    port = _number("MASTER_PORT", 0, least=1)
    if port > 65535:
        raise UserError(f"MASTER_PORT={port}: expected a port from 1 to 65535; {_LAUNCH}")
    return address, port, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launcher_process() -> int | None:
    """Process id of the launcher whose end is to stop this process; None without a launcher that stays its parent."""
    is_launched = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))
    parent = parent_at_start()
    return parent if is_launched and parent > 1 else None  # 1: detached from the start, or alone in a container


def launched_job() -> tuple[str | None, int]:
    """Slurm's id of this process's job, if any, and how often it was requeued."""
    return os.environ.get("SLURM_JOB_ID"), _number("SLURM_RESTART_COUNT", 0)


def tell_launcher(text: str) -> None:
    """Gives torchrun, or accelerate, why this process ends: their report, the last on the screen, ends with it."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": said}}))


def is_repeated_start() -> bool:
    """Whether torchrun or Slurm starts this job again, after a crash or a requeue."""
    return launched_job()[1] + _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


_LAUNCH = "start with torchrun or accelerate launch, which set it, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise UserError(f"{name}={shortened(text)} in the environment: expected a whole number, at least {least}")
    return int(text)


def child_environment(hide_gpus: bool) -> dict[str, str]:
    """This process's environment for a launcher that it starts itself, without the variables of an outer launcher."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "CUDA_VISIBLE_DEVICES": ""} if hide_gpus else kept


def require_own_strategy(name: str) -> None:
    """The run config chooses the strategy: a launcher that asks for another one is refused, the same one is ignored.

    accelerate's launcher requests DeepSpeed or FSDP through variables. `Accelerator` would then create a plugin of
    its own, with values unknown to the run config, and transformers would load the model through it.
    """
    remedy = "the run config decides: launch with launch/accelerate/ddp.yaml (for every strategy), and set strategy."
    for kind, variable in (("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED"), ("FSDP", "ACCELERATE_USE_FSDP")):
        if os.environ.pop(variable, "false").lower() != "true":
            continue
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if kind == "DEEPSPEED" and file != "none":
            raise UserError(f"the launcher's config names the DeepSpeed config {file}; {remedy}ds_config={file}")
        if not (name.startswith(f"zero{stage}") if kind == "DEEPSPEED" else name == "fsdp"):
            what = f"{kind} with ZeRO stage {stage}" if kind == "DEEPSPEED" and stage else kind
            raise UserError(
                f"the launcher's config asks for distributed_type {what}, the run config for strategy.name={name}; "
                f"{remedy}name"
            )
