"""Optimizer, learning rate, and optimizer states as named tensors that safetensors can store.

The only module that imports bitsandbytes' optimizers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .flat import FlatParameters, ParameterGroups


def decays(parameter: torch.nn.Parameter) -> bool:
    """Weight decay applies to matrices, not to biases, norms and magnitude vectors."""
    return parameter.ndim >= 2


def build_optimizer(
    flat: FlatParameters | ParameterGroups,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """AdamW over the groups: torch's fused one, or bitsandbytes' 8-bit or paged ones.

    On a CPU bitsandbytes has no paging; its optimizers then keep ordinary states, with the same values.
    """
    groups = [
        {"params": group.optimized, "weight_decay": weight_decay if group.decays else 0.0} for group in flat.groups
    ]
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    import bitsandbytes as bnb

    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }
    optimizer: torch.optim.Optimizer = kinds[name](groups, **options)
    return optimizer


def step_optimizer(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One update at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with quiet_paging():
        optimizer.step()


@contextmanager
def quiet_paging() -> Iterator[None]:
    """Around a step: on a CPU bitsandbytes warns about paging at every state; build_optimizer warns once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def lr_at(
    step: int,  # 0-based update
    *,
    lr: float,
    schedule: str,
    warmup_steps: float,  # below 1: the share of num_steps
    num_steps: int,
    min_lr_ratio: float,
) -> float:
    """Learning rate of an update: linear warm-up to lr, then constant, or linear or cosine to lr * min_lr_ratio.

    >>> [lr_at(s, lr=1.0, schedule="linear", warmup_steps=2, num_steps=6, min_lr_ratio=0.0) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if warmup_steps < 1:
        warmup_steps = math.ceil(warmup_steps * num_steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    shape = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return lr * (min_lr_ratio + (1.0 - min_lr_ratio) * shape)


# --- states -----------------------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """States as host tensors named `group.key`, and the plain numbers among them (bitsandbytes' step counts)."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                # clone: a view of managed memory or of the live state must not change while it is written
                tensors[f"{index}.{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                numbers[f"{index}.{key}"] = value
    return tensors, numbers


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], numbers: dict[str, float]
) -> None:
    """Restores saved states. Raises ValueError if they are not this optimizer's.

    The optimizer itself first creates its states, with an update that changes nothing; they are then filled in place:
    paged states stay in managed memory (load_state_dict leaves ordinary tensors, which the next step refuses).
    """
    _create_states(optimizer)
    expected = {
        f"{index}.{key}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state[parameter].items()
    }
    saved = tensors.keys() | numbers.keys()
    if expected.keys() != saved:
        raise ValueError(f"optimizer states: saved {sorted(saved)}, but this optimizer expects {sorted(expected)}")
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            if value.shape != tensors[name].shape or value.dtype != tensors[name].dtype:
                raise ValueError(
                    f"optimizer state {name}: saved {tuple(tensors[name].shape)} {tensors[name].dtype}, "
                    f"expected {tuple(value.shape)} {value.dtype}"
                )
            value.copy_(tensors[name])
        else:
            index, _, key = name.partition(".")
            optimizer.state[_parameters(optimizer)[int(index)]][key] = type(value)(numbers[name])


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _create_states(optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer allocate its states, by an update at learning rate zero with zero gradients."""
    kept = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
        for parameter in group["params"]:
            assert parameter.grad is not None and not parameter.grad.any(), "states are loaded before the first step"
    step_optimizer(optimizer, 0.0)
    for group, (lr, weight_decay) in zip(optimizer.param_groups, kept):
        group["lr"], group["weight_decay"] = lr, weight_decay
