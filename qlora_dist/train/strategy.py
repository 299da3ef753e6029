"""The strategy of a run: config -> `Update`, which turns gradients into new weights."""

from __future__ import annotations

from typing import Any

import torch

from ..cluster.world import World
from ..config import RunConfig
from ..data.accumulation import derive_accumulation
from ..errors import UserError
from ..model import packed_experts
from ..model.lora import is_own_expert, trainable_parameters
from ..optim import Update
from ..optim.adamw import build_optimizer, decays
from ..optim.deepspeed_config import REPLICATES, STAGES, check_pairs, fill_ds_config, find_ds_config
from ..optim.flat import FlatParameters, ParameterGroups
from ..optim.replicated import ReplicatedUpdate
from ..optim.zero import ZeroUpdate, require_deepspeed
from ..optim.zero3 import Zero3Update


def describe_strategy(config: RunConfig, num_ranks: int) -> str:
    """What each rank holds whole, what is sharded, and what is in host memory."""
    if config.strategy.name != "fsdp":
        return REPLICATES[config.strategy.name]
    where = " in host memory" if config.strategy.offload else ""
    over = config.strategy.shard_ranks(num_ranks)
    groups = "" if over == num_ranks else f" among {over} ranks, as do the other {num_ranks // over - 1} groups"
    return (
        f"every rank holds 1/{over} of the base's matrices and constants{where}, and whole norms and adapters; "
        f"layers are gathered when they run{groups}"
    )


def check_update(config: RunConfig, world: World) -> None:
    """Before data or weights are read: the strategy suits the optimizer and the base, and its file does not contradict.

    Raises UserError.
    """
    _check_fsdp(config, world.size)
    if config.strategy.name in STAGES:
        check_pairs(
            config.strategy.name,
            optimizer=config.optim.name,
            quantization=config.model.quantization,
            recompute=config.memory.recompute,
            variant=None if config.lora is None else config.lora.variant,
        )
        _ds_config(config, world)
        require_deepspeed()
    elif config.strategy.ds_config is not None:
        raise UserError(
            f"strategy.ds_config is {config.strategy.ds_config}, but strategy.name {config.strategy.name} does not use "
            f"DeepSpeed; set strategy.name to one of {', '.join(STAGES)}, or remove ds_config"
        )


def _check_fsdp(config: RunConfig, num_ranks: int) -> None:
    """What fsdp cannot do, and what can."""
    strategy = config.strategy
    if strategy.offload and strategy.name != "fsdp":
        raise UserError(f"strategy.offload is true, which only strategy fsdp does; strategy.name is {strategy.name}")
    if strategy.name != "fsdp":
        if strategy.shard_over not in ("auto", "all"):
            raise UserError(
                f"strategy.shard_over is {strategy.shard_over}, which only strategy fsdp reads; strategy.name is "
                f"{strategy.name}"
            )
        return
    if strategy.offload and strategy.shard_ranks(num_ranks) < 2:
        raise UserError("strategy.offload is true, but one rank shards nothing; use several ranks, or set it to false")
    if config.lora is None:
        raise UserError("strategy fsdp shards a frozen base; full fine-tuning has none: use strategy ddp")
    if config.model.quantization == "int8":
        raise UserError("strategy fsdp cannot shard int8 weights; use quantization nf4, fp4 or none, or strategy ddp")
    if config.lora.variant == "dora":
        raise UserError("lora.variant dora needs whole weights outside of their layer; use lora, or strategy ddp")


def load_device(config: RunConfig, world: World) -> torch.device:
    """Where the base is loaded: in host memory if DeepSpeed then moves a shard of each weight to the device.

    A quantized base is loaded on the device: bitsandbytes quantizes there, and its constants stay there.
    """
    is_cut = config.strategy.name == "zero3" and config.model.quantization == "none"
    return torch.device("cpu") if is_cut else world.device


def build_update(config: RunConfig, world: World, model: torch.nn.Module, head_weight: torch.Tensor) -> Update:
    """The update of the model's trainable weights, which must already be on their device."""
    parameters = trainable_parameters(model)
    is_zero = config.strategy.name in STAGES
    groups = ParameterGroups(parameters, decays) if is_zero else FlatParameters(parameters, decays)
    if is_zero and (experts := [name for name in parameters if is_own_expert(name)]):
        raise UserError(
            f"strategy.name {config.strategy.name} cannot train the experts of a mixture ({experts[0]}, ...): "
            "DeepSpeed reduces gradients as they arrive, and an expert without tokens on a rank has none; "
            "leave them out of lora.target_modules, or set strategy.name=ddp"
        )
    if config.strategy.name == "zero3" and packed_experts(model):
        raise UserError(
            "strategy.name zero3 gathers weights layer by layer, which experts in 4 bits are not; use strategy fsdp, "
            "which shards them, or zero2"
        )
    optim = config.optim
    optimizer = build_optimizer(
        groups, name=optim.name, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps
    )
    if isinstance(groups, FlatParameters):
        return ReplicatedUpdate(world, groups, optimizer, optim.max_grad_norm)
    ds_config = _ds_config(config, world)
    if STAGES[config.strategy.name] == 3:
        return Zero3Update(world, groups, optimizer, ds_config, model, head_weight)
    return ZeroUpdate(world, groups, optimizer, ds_config)


def _ds_config(config: RunConfig, world: World) -> dict[str, Any]:
    batch, strategy = config.batch, config.strategy
    return fill_ds_config(
        find_ds_config(strategy.name, strategy.ds_config),
        strategy=strategy.name,
        rows_per_step=batch.rows_per_step,
        micro_rows=batch.resolved_micro_rows,
        accumulation=derive_accumulation(batch.rows_per_step, batch.resolved_micro_rows, world.size),
        max_grad_norm=config.optim.max_grad_norm,
    )
