"""The strategy of a run: config -> what turns gradients into an update."""

from __future__ import annotations

from typing import Any

import torch

from ..adapters import trainable_parameters
from ..config import RunConfig
from ..distributed import World
from ..errors import UserError
from ..flat import FlatParameters, ParameterGroups
from ..loader import derive_accumulation
from ..optim import build_optimizer, decays
from ..update import Update
from ..update.deepspeed_config import REPLICATES, STAGES, check_pairs, fill_ds_config, find_ds_config
from ..update.replicated import ReplicatedUpdate
from ..update.zero import ZeroUpdate, require_deepspeed
from ..update.zero3 import Zero3Update


def micro_rows(config: RunConfig) -> int:
    """`batch.micro_rows` as a number."""
    assert config.batch.micro_rows != "auto", "fitting.settle comes first"
    return config.batch.micro_rows


def describe_strategy(config: RunConfig) -> str:
    """What each rank replicates, shards, and keeps in host memory."""
    return REPLICATES[config.strategy.name]


def check_update(config: RunConfig, world: World) -> None:
    """Before data or weights are read: the strategy fits the optimizer and the base, and its file says nothing else.

    Raises UserError.
    """
    if config.strategy.name in STAGES:
        check_pairs(config.strategy.name, config.optim.name, config.model.quantization)
        _ds_config(config, world)
        require_deepspeed()
    elif config.strategy.ds_config is not None:
        raise UserError(
            f"strategy.ds_config is {config.strategy.ds_config}, but strategy.name {config.strategy.name} does not use "
            f"DeepSpeed; set strategy.name to one of {', '.join(STAGES)}, or remove ds_config"
        )


def build_update(config: RunConfig, world: World, model: torch.nn.Module, head_weight: torch.Tensor) -> Update:
    """Takes charge of the model's trainable weights, which are on their device and stay there."""
    parameters = trainable_parameters(model)
    is_zero = config.strategy.name in STAGES
    groups = ParameterGroups(parameters, decays) if is_zero else FlatParameters(parameters, decays)
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
        micro_rows=micro_rows(config),
        accumulation=derive_accumulation(batch.rows_per_step, micro_rows(config), world.size),
        max_grad_norm=config.optim.max_grad_norm,
    )
