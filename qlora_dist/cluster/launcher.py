"""What the launcher (accelerate, torchrun, srun, Slurm) sets in the environment. Before any process group exists."""

from __future__ import annotations

import os

from ..errors import UserError


def launched_job() -> tuple[str | None, int]:
    """Slurm's id of this process's job, if any, and how often it was requeued."""
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


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
