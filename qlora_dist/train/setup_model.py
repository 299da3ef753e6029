"""The model of a run: 4-bit base -> adapters -> optimizer, and the checks before the first step."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ..cluster.world import World
from ..config import RunConfig
from ..files import format_bytes
from ..model import (
    base_checksum,
    cached_4bit,
    check_blocks,
    check_gathered_layer,
    check_head,
    held_bytes,
    load_base,
    output_head,
    set_recompute,
    unwrap,
)
from ..model.activation_offload import ActivationOffload
from ..model.dropout import dropout_rows
from ..model.lora import attach_lora, count_parameters
from .checks.base import check_base_bytes, check_source_bits, check_storage, promised_base_bytes
from .step import TrainingModel
from .strategy import build_update, load_device


def build_model(config: RunConfig, world: World) -> TrainingModel:
    """Base -> adapters -> optimizer and gradient reduction."""
    settings = config.model
    compute_dtype: torch.dtype = getattr(torch, settings.compute_dtype)
    module = _adapted_base(config, world, compute_dtype)
    assert config.memory.recompute != "auto", "resolve_auto comes first"
    set_recompute(module, config.memory.recompute)
    module.train()
    num_base, num_trainable = count_parameters(module)
    head = output_head(module)
    update = build_update(config, world, module, head.weight)
    offload = ActivationOffload(world.device) if config.memory.offload_activations else None

    @contextmanager
    def forward_context() -> Iterator[None]:
        with ExitStack() as stack:
            if config.lora is None and compute_dtype != torch.float32:
                stack.enter_context(torch.autocast(world.device.type, compute_dtype))
            if offload is not None:
                stack.enter_context(offload)
            yield

    with forward_context():  # as in a step: full fine-tuning has fp32 weights and computes in 16 bits
        update.forward(lambda: check_head(module))
        if config.strategy.name != "zero3":  # whose gathers follow the steps of its engine
            check_blocks(module)
    check_gathered_layer(module)
    world.require_equal(update.digest(), "the initial trainable weights")
    return TrainingModel(
        module, head, update, compute_dtype, forward_context, num_base, num_trainable, dropout_rows(module)
    )


def _adapted_base(config: RunConfig, world: World, compute_dtype: torch.dtype) -> torch.nn.Module:
    """The base with its adapters; for full fine-tuning the base with all weights trainable."""
    settings, lora = config.model, config.lora
    source = _base_source(config, world)
    over = config.strategy.shard_ranks(world.size)
    shards = world.shard_group(over) if config.strategy.name == "fsdp" else None
    with world.stoppable(f"loading {settings.name}", has_collectives=shards is not None):
        module: torch.nn.Module = load_base(
            source,
            revision=settings.revision,
            copy_of=settings.name,
            quantization=settings.quantization,
            double_quant=settings.double_quant,
            # full fine-tuning keeps fp32 masters and computes under autocast
            compute_dtype=torch.float32 if lora is None else compute_dtype,
            attention=settings.attention,
            attention_dtype=compute_dtype,
            device=load_device(config, world),
            run_device=world.device,
            weights=settings.weights,
            seed=config.seed,
            shards=shards,
            offload=config.strategy.offload,
        )
    if lora is None:
        return module.requires_grad_(True)
    return attach_lora(
        module,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        experts=lora.experts,
        variant=lora.variant,
        seed=config.seed,
        init_from=lora.init_from,
        kernels=settings.kernels,
        device=world.device,
    )


def _base_source(config: RunConfig, world: World) -> str:
    """Where the base is read from: the model, or its 4-bit copy on this node, which the node's first rank creates."""
    settings = config.model
    if settings.cache_4bit is None or settings.weights != "files":
        return settings.name
    what = "writing the 4-bit copy of the base"
    with world.stoppable(what), world.local_main_first(what):
        return cached_4bit(
            settings.cache_4bit,
            settings.name,
            revision=settings.revision,
            quantization=settings.quantization,
            double_quant=settings.double_quant,
            compute_dtype=getattr(torch, settings.compute_dtype),
            device=world.device,
            is_checked=world.local_rank != 0,
        )


def check_base(config: RunConfig, world: World, model: TrainingModel) -> str:
    """Checks the base in memory before the first step: bytes on each rank, bits of one layer. Records its checksum.

    Returns what was compared. Full fine-tuning has no frozen base.
    """
    if config.lora is None:
        return "no frozen base: all weights are trained"
    settings = config.model
    dtype: torch.dtype = getattr(torch, settings.compute_dtype)
    promised = promised_base_bytes(
        settings.name,
        revision=settings.revision,
        quantization=settings.quantization,
        double_quant=settings.double_quant,
        dtype=dtype,
        has_own_head=model.head.weight is not unwrap(model.module).get_input_embeddings().weight,
    )
    strategy = config.strategy.name
    over = config.strategy.shard_ranks(world.size) if strategy == "fsdp" else world.size
    expected = promised.on_each_rank(strategy, over)
    held = world.gather((socket.gethostname(), held_bytes(model.module)))
    check_base_bytes(held, expected, strategy)
    check_storage(
        model.module, settings.name, revision=settings.revision, quantization=settings.quantization, dtype=dtype
    )
    if strategy == "zero3":
        compared = "a gathered layer is not compared with its source: DeepSpeed gathers and drops weights by itself"
    elif strategy == "fsdp":
        compared = "a gathered layer is bit-equal to its quantized source"  # build_model has checked it
    elif settings.weights != "files":
        compared = "its weights are random"
    else:
        compared = check_source_bits(
            model.module, settings.name, revision=settings.revision, compute_dtype=dtype, seed=config.seed
        )
    model.base_checksum = base_checksum(model.module)
    said = getattr(unwrap(model.module), "requantized", None)
    compared = compared if said is None else f"{compared}; {said}"
    return f"base: {format_bytes(expected)} on each rank, as {strategy} promises; {compared}"
