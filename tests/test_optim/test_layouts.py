"""Optimizer states between the layout of checkpoints and DeepSpeed's partitions, for any sizes and number of ranks."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_dist.optim.adamw import decays
from qlora_dist.optim.flat import ALIGNMENT, ParameterGroups
from qlora_dist.optim.zero import ZeroUpdate
from qlora_dist.optim.zero3 import Zero3Update

SIZES = {"a": (5, 1), "b": (1, 1), "c": (16, 16), "d": (7, 41), "e": (3, 2)}


def groups_of(sizes: dict[str, tuple[int, ...]]) -> ParameterGroups:
    return ParameterGroups({name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in sizes.items()}, decays)


def layout_of(groups: ParameterGroups) -> torch.Tensor:
    """A state in the layout: other values for every element, zeros between weights."""
    (group,) = groups.groups
    state = torch.zeros(group.size)
    for placement, parameter in zip(group.placements, group.parameters.values()):
        state[placement.start : placement.start + parameter.numel()] = torch.arange(parameter.numel()) + placement.start
        state[placement.start] += 0.5
    return state


def on_rank(kind: type, groups: ParameterGroups, rank: int, size: int, zero: Any) -> Any:
    """An update of this rank without its engine."""
    update = kind.__new__(kind)
    update._world, update._groups, update._zero = SimpleNamespace(rank=rank, size=size), groups, zero
    return update


def zero3_of(groups: ParameterGroups, num_ranks: int) -> Any:
    """As DeepSpeed: each weight cut into equal parts, the last one padded; in an order of its own."""
    order = list(groups.groups[0].parameters.values())[::-1]
    for parameter in order:
        shard = -(-parameter.numel() // num_ranks)
        parameter.partition_numel = partial(int, shard)  # type: ignore[attr-defined]
    partition = torch.zeros(sum(-(-parameter.numel() // num_ranks) for parameter in order))
    return SimpleNamespace(fp16_groups=[order], fp32_partitioned_groups_flat=[partition])


def zero_of(groups: ParameterGroups, num_ranks: int) -> Any:
    """As DeepSpeed: all weights of a group in a row, in an order of its own, padded, cut into equal parts."""
    order = list(groups.groups[0].parameters.values())[::-1]
    offsets, at = [], 0
    for parameter in order:
        offsets.append(at)
        at += parameter.numel()
    partition = torch.zeros(-(-at // num_ranks))
    return SimpleNamespace(
        round_robin_bit16_groups=[order],
        round_robin_bit16_offsets=[offsets],
        single_partition_of_fp32_groups=[partition],
    )


def shards_by_hand(groups: ParameterGroups, state: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """What a rank of ZeRO-3 holds: weight by weight, each padded to a multiple of the ranks."""
    (group,) = groups.groups
    parts = []
    for placement, parameter in reversed(list(zip(group.placements, group.parameters.values()))):
        shard = -(-parameter.numel() // num_ranks)
        whole = torch.zeros(shard * num_ranks)
        whole[: parameter.numel()] = state[placement.start : placement.start + parameter.numel()]
        parts.append(whole[shard * rank : shard * (rank + 1)])
    return torch.cat(parts)


@pytest.mark.parametrize("num_ranks", range(1, 14))
@pytest.mark.parametrize("kind", [ZeroUpdate, Zero3Update])
def test_a_state_is_cut_for_the_ranks_and_put_together_again(kind: type, num_ranks: int) -> None:
    groups = groups_of(SIZES)
    state = layout_of(groups)
    zero = (zero3_of if kind is Zero3Update else zero_of)(groups, num_ranks)
    ranks = [on_rank(kind, groups, rank, num_ranks, zero) for rank in range(num_ranks)]
    parts = [update._own_part("0.exp_avg", state) for update in ranks]
    if kind is Zero3Update:
        for rank, part in enumerate(parts):
            assert torch.equal(part, shards_by_hand(groups, state, rank, num_ranks)), rank
    assert torch.equal(ranks[0]._to_layout(0, parts), state)
    step = torch.tensor(7.0)
    assert all(torch.equal(update._own_part("0.step", step), step) for update in ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_each_rank_has_the_scales_of_its_own_blocks(num_ranks: int) -> None:
    groups = groups_of({"a": (8, ALIGNMENT)})
    zero = zero_of(groups, num_ranks)
    scales = torch.arange(8.0)
    parts = [on_rank(ZeroUpdate, groups, r, num_ranks, zero)._own_part("0.absmax1", scales) for r in range(num_ranks)]
    assert torch.equal(torch.cat(parts), scales)
