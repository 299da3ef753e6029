"""What evaluating and generating with a trained model need on a rank: base, adapter, and one layer at work."""

from __future__ import annotations

from ..config import RunConfig
from .choosing import changed_config
from .constants import CONTEXT_BYTES, NCCL_BYTES, Item
from .resident import adapter_sizes, aligned_size, base_bytes, compute_size, persistent
from .shapes import ModelShapes
from .step_peak import CHUNK_BYTES
from .strategies import sharing

MOST_RANKS = 64
_KEPT = ("base", "quantization constants", "embeddings, head, norms", "adapters")


def inference_items(config: RunConfig, shapes: ModelShapes, *, world_size: int, tokens: int) -> dict[str, Item]:
    """Bytes on one of `world_size` ranks while `tokens` run at a time, without what fragmentation adds."""
    assert config.lora is not None
    strategy = config.strategy
    shared = sharing(strategy.name, world_size, strategy.offload, strategy.shard_ranks(world_size))
    sizes = adapter_sizes(config.lora.rank, config.lora.target_modules, shapes, config.lora.variant == "dora")
    aligned = sum(map(aligned_size, sizes))
    base, constants, _ = base_bytes(config, shapes)
    size = compute_size(config)
    widest = max(linear.outputs for one, _ in shapes.each_layer() for linear in one.linears)
    resident = persistent(config, shapes, aligned, shared)
    items = {name: resident[name] for name in _KEPT if name in resident}
    if world_size > 1 and strategy.name == "fsdp":
        head = shapes.vocabulary * shapes.hidden * size
        items |= shared.buffers(0, (base + constants) // shapes.num_layers, head)
    items["one layer"] = Item(4 * tokens * max(widest, shapes.hidden) * size, "activations of the layer that runs")
    items["logits"] = Item(min(2 * CHUNK_BYTES, 8 * tokens * shapes.vocabulary), "and their exponentials, in chunks")
    items["CUDA context"] = Item(CONTEXT_BYTES, "outside PyTorch", is_tensor=False)
    if groups := shared.num_communicators:
        items["NCCL"] = Item(groups * NCCL_BYTES, "outside PyTorch", is_tensor=False)
    return items


def inference_bytes(config: RunConfig, shapes: ModelShapes, *, world_size: int, tokens: int) -> int:
    """Their sum."""
    return sum(one.size for one in inference_items(config, shapes, world_size=world_size, tokens=tokens).values())


def fewest_ranks(config: RunConfig, shapes: ModelShapes, *, device_bytes: int, tokens: int) -> int | None:
    """Over how many ranks the base must be sharded at least; None: no number helps."""
    config = changed_config(config, strategy={"shard_over": "all"})
    counts = range(1, MOST_RANKS + 1)
    if shapes.experts is not None:  # sharded by expert
        counts = [count for count in counts if shapes.experts.num_experts % count == 0]  # type: ignore[assignment]
    needed = (
        count for count in counts if inference_bytes(config, shapes, world_size=count, tokens=tokens) <= device_bytes
    )
    return next(needed, None)
