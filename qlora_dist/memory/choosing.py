"""Which settings fit: recompute level, micro-batch, row length, strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..config import RunConfig
from ..errors import UserError
from ..files import format_bytes
from .plan import MemoryPlan, plan_memory, planned_micro_rows
from .shapes import ModelShapes
from .strategies import STRATEGIES

LARGEST_MICRO_ROWS = 64
LARGEST_ROW_TOKENS = 2**20


def choose(
    config: RunConfig,
    shapes: ModelShapes,
    *,
    world_size: int,
    device_bytes: int,
) -> MemoryPlan:
    """The plan with `auto` settings resolved. `memory.recompute: auto` becomes the smallest number of recomputed
    layers that fits, `batch.micro_rows: auto` the largest micro-batch that fits; if both are auto, the fastest pair:
    a micro-batch of a few thousand tokens with fewer layers recomputed beats a larger one.

    If nothing fits, `fits` is False and `advice` lists the cheapest changes that would make it fit.
    """

    def plan(recompute: int | None = None, micro_rows: int | None = None) -> MemoryPlan:
        return plan_memory(
            config,
            shapes,
            world_size=world_size,
            device_bytes=device_bytes,
            recompute=recompute,
            micro_rows=micro_rows,
        )

    is_auto = config.memory.recompute == "auto"
    candidates = [planned_micro_rows(config)]
    if not isinstance(config.batch.micro_rows, int):
        candidates = _micro_rows_that_divide(config.batch.rows_per_step, world_size)

    def resolved(rows: int) -> MemoryPlan:
        return plan(
            _smallest_recompute(lambda layers: plan(layers, rows), shapes.num_layers) if is_auto else None, rows
        )

    plans = [resolved(rows) for rows in candidates]
    fitting = [candidate for candidate in plans if candidate.fits]
    if fitting:
        return min(fitting, key=lambda p: (p.paged_out_bytes > 0, relative_time(p), -p.micro_rows))
    chosen = plans[0]
    return chosen.with_advice(tuple(_advice(config, shapes, chosen, world_size, device_bytes)))


def with_shards(
    config: RunConfig, shapes: ModelShapes, *, world_size: int, node_ranks: int | None, device_bytes: int | None
) -> RunConfig:
    """The config with `strategy.shard_over` as a number of ranks; of another strategy than fsdp as it is.

    `node_ranks`: on each node; None: not the same everywhere. auto is a node where that fits by the plan, or nothing is
    planned, and gathers stay within it; else all ranks. Raises UserError.
    """
    over, over_all = config.strategy.shard_over, changed_config(config, strategy={"shard_over": "all"})
    if config.strategy.name != "fsdp":
        return config
    if isinstance(over, int):
        if over != world_size and (node_ranks is None or node_ranks % over):
            of_node = "not the same on all nodes" if node_ranks is None else f"{node_ranks:,}"
            raise UserError(
                f"strategy.shard_over is {over}, which does not divide the number of ranks on a node ({of_node}): "
                "groups would span nodes, or be incomplete. Give a number that divides it, node, or all"
            )
        return config
    if over == "node" and node_ranks is None:
        raise UserError(
            "strategy.shard_over is node, but the nodes have different numbers of ranks, and so would the shards: "
            "start the same number on every node, or set strategy.shard_over=all"
        )
    if over == "node" and node_ranks == 1 < world_size:
        raise UserError(
            "strategy.shard_over is node, but a node has one rank, over which nothing is sharded: set "
            "strategy.shard_over=all, or strategy.name=ddp if the base fits on a GPU"
        )
    if over == "all" or node_ranks in (None, 1, world_size):
        return over_all
    within = changed_config(config, strategy={"shard_over": node_ranks})
    if over == "node" or device_bytes is None:
        return within
    return within if choose(within, shapes, world_size=world_size, device_bytes=device_bytes).fits else over_all


def _micro_rows_that_divide(rows_per_step: int, world_size: int) -> list[int]:
    per_rank = max(1, rows_per_step // world_size)
    return [count for count in range(1, min(per_rank, LARGEST_MICRO_ROWS) + 1) if per_rank % count == 0]


def relative_time(plan: MemoryPlan) -> float:
    """Time per token relative to a run that computes every layer twice and needs no dequantization.

    Products of a linear layer: one forward and two in the backward pass (one of them recomputation, which skips the
    last linear layer). Dequantization costs 497 / tokens of the products that it serves, at the rate of bitsandbytes'
    kernel: each pass over the weights is paid once per micro-batch, however long that is.
    """
    share = plan.recompute / plan.num_layers
    products = 0.673 + 0.242 * share
    return products + (2 + share) / 3 * 497 / (plan.micro_rows * plan.row_tokens)


def _smallest_recompute(plan: Callable[[int], MemoryPlan], num_layers: int) -> int:
    """The fewest recomputed layers with nothing paged out; else the fewest that fit; else all."""
    for is_good in (lambda p: p.fits and not p.paged_out_bytes, lambda p: p.fits):
        low, high = 0, num_layers
        if not is_good(plan(high)):
            continue
        while low < high:  # more recomputation never needs more memory
            middle = (low + high) // 2
            low, high = (low, middle) if is_good(plan(middle)) else (middle + 1, high)
        return low
    return num_layers


def largest_row_tokens(config: RunConfig, shapes: ModelShapes, *, world_size: int, device_bytes: int) -> int:
    """Longest rows, in multiples of 256 tokens, that fit one at a time with every layer recomputed; 0: none. At most as
    long as the model's positions: a document fills a row where it is as long."""
    largest = min(shapes.max_positions or LARGEST_ROW_TOKENS, LARGEST_ROW_TOKENS)

    def fits(tokens: int) -> bool:
        changed = changed_config(config, data={"row_tokens": tokens})
        return bool(
            plan_memory(
                changed, shapes, world_size=world_size, device_bytes=device_bytes,
                recompute=shapes.num_layers, micro_rows=1,
            ).fits
        )  # fmt: skip

    return _bisect(fits, min(256, largest), largest)


def largest_micro_rows(config: RunConfig, shapes: ModelShapes, *, world_size: int, device_bytes: int) -> int:
    """Most rows per micro-batch that fit with every layer recomputed; 0: none."""

    def fits(rows: int) -> bool:
        return bool(
            plan_memory(
                config, shapes, world_size=world_size, device_bytes=device_bytes,
                recompute=shapes.num_layers, micro_rows=rows,
            ).fits
        )  # fmt: skip

    return _bisect(fits, 1, 2**16)


def _bisect(fits: Callable[[int], bool], unit: int, largest: int) -> int:
    low, high = 0, largest // unit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle - 1)
    return low * unit


def changed_config(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """A copy with changed values, not validated again: a plan may explore values that a run may not use."""
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=updates)


# --- advice -----------------------------------------------------------------------------------------------------------


def _advice(
    config: RunConfig,
    shapes: ModelShapes,
    plan: MemoryPlan,
    world_size: int,
    device_bytes: int,
) -> Iterator[str]:
    """Single changes that would make it fit, cheapest first: no cost, then speed, then a different result."""
    sizes: dict[str, Any] = {
        "world_size": world_size, "device_bytes": device_bytes
    }  # fmt: skip
    full = shapes.num_layers

    def headroom(changed: RunConfig, recompute: int = full, rows: int = plan.micro_rows) -> int:
        tried = plan_memory(changed, shapes, **sizes, recompute=recompute, micro_rows=rows)
        assert tried.headroom_bytes is not None
        return tried.headroom_bytes

    found = 0
    for text, changed, rows in _changes(config, plan, world_size):
        left = headroom(changed, rows=rows)
        if left >= 0:
            found += 1
            yield f"{text} ({format_bytes(left)} would be free)"
    tokens = largest_row_tokens(config, shapes, **sizes)
    if tokens:
        yield f"data.row_tokens={tokens}: the longest rows that fit with batch.micro_rows=1 and memory.recompute=full"
    elif not found:
        smallest = plan_memory(config, shapes, **(sizes | {"device_bytes": None}), recompute=full, micro_rows=1)
        needed = smallest.peak_bytes - smallest.pageable_bytes
        yield f"no single change is enough: one row with every layer recomputed needs {format_bytes(needed)}"


def _changes(config: RunConfig, plan: MemoryPlan, world_size: int) -> Iterator[tuple[str, RunConfig, int]]:
    if plan.recompute < plan.num_layers:
        yield "memory.recompute=full", config, plan.micro_rows
    if plan.micro_rows > 1:
        yield "batch.micro_rows=1 and memory.recompute=full (same result)", config, 1
    if not config.memory.offload_activations:
        offloaded = changed_config(config, memory={"offload_activations": True})
        yield "memory.offload_activations=true (same result)", offloaded, plan.micro_rows
    if not config.model.double_quant and config.model.quantization in ("nf4", "fp4"):
        yield "model.double_quant=true", changed_config(config, model={"double_quant": True}), plan.micro_rows
    if config.model.attention == "sdpa":
        yield "model.attention=auto", changed_config(config, model={"attention": "auto"}), plan.micro_rows
    if not config.optim.name.startswith("paged"):
        paged = "paged_adamw_8bit" if config.optim.name.endswith("8bit") else "paged_adamw_32bit"
        yield f"optim.name={paged}", changed_config(config, optim={"name": paged}), plan.micro_rows
    if config.strategy.name == "fsdp" and config.strategy.shard_ranks(world_size) < world_size:
        yield "strategy.shard_over=all", changed_config(config, strategy={"shard_over": "all"}), plan.micro_rows
    for name in STRATEGIES:
        # a single rank can shard nothing, only offload to the host
        if name != config.strategy.name and (world_size > 1 or name == "zero2_offload"):
            changed, text = changed_config(config, strategy={"name": name}), f"strategy.name={name}"
            if name == "zero2_offload" and config.optim.name != "adamw":
                changed = changed_config(changed, optim={"name": "adamw"})
                text += " with optim.name=adamw"
            yield text, changed, plan.micro_rows
    if (
        world_size > 1
        and config.lora is not None
        and config.model.quantization != "int8"
        and not config.strategy.offload
    ):
        changed = changed_config(config, strategy={"name": "fsdp", "offload": True})
        yield "strategy.name=fsdp with strategy.offload=true (slow)", changed, plan.micro_rows
    if config.lora is not None and config.model.quantization in ("none", "int8"):
        changed = changed_config(config, model={"quantization": "nf4", "double_quant": True})
        yield "model.quantization=nf4", changed, plan.micro_rows
    if config.lora is not None and config.lora.rank > 16:
        yield "lora.rank=16", changed_config(config, lora={"rank": 16}), plan.micro_rows
