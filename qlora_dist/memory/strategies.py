"""What each strategy keeps on a rank: its shards of weights, gradients and optimizer states, and its buffers."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .constants import Item

STRATEGIES = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp")
BUCKET_BYTES = 32 * 2**20  # optim.reducer.BUCKET_BYTES
DEEPSPEED_BUCKET_BYTES = 4 * 16_777_216  # ds_configs/*.json: reduce_bucket_size fp32 elements; a second one never fills
GATHERED_LAYERS = 2  # the one being computed, and the next, being prefetched
GATHER_BYTES = 256 * 2**20  # cluster.world.GATHER_BYTES


@dataclass(frozen=True)
class Sharing:
    """Fractions that one rank holds."""

    name: str
    world_size: int
    adapters: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0
    is_offloaded: bool = False  # optimizer states are on the host
    has_master_partition: bool = False  # DeepSpeed clones the shard of weights that it updates
    has_host_base: bool = False  # the shard of the base is on the host between uses
    shard_ranks: int = 1  # fsdp: the ranks that share one base

    def base(self, quantization: str) -> float:
        """Fraction of the linear layers' weights that stays on a rank's device."""
        if self.has_host_base:
            return 0.0
        # ZeRO-3 does not partition quantized weights while loading
        if self.name == "fsdp":
            return 1.0 / self.shard_ranks
        return 1.0 / self.world_size if self.name == "zero3" and quantization == "none" else 1.0

    @property
    def tables(self) -> float:
        """Fraction of the embedding and the head that stays on a rank's device."""
        if self.has_host_base:
            return 0.0
        return 1.0 / self.shard_ranks if self.name == "fsdp" else 1.0

    def buffers(self, trained_bytes: int, layer_bytes: int, head_bytes: int) -> dict[str, Item]:
        """Communication buffers. `layer_bytes`: base weights of one decoder layer."""
        if self.world_size == 1 and self.name in ("ddp", "fsdp"):
            return {}
        if self.name == "ddp":
            # buckets are views of the gradients; checking that they are finite allocates |x| and two masks
            size, what = min(BUCKET_BYTES, trained_bytes) * 6 // 4, "checks one bucket for non-finite values"
        elif self.name in ("fsdp", "zero3"):
            size = max(GATHERED_LAYERS * layer_bytes, head_bytes)
            what = f"{GATHERED_LAYERS} gathered layers, one of them prefetched; or the head, for the loss"
            if self.has_host_base:
                size += size // self.shard_ranks
                what += "; and this rank's part of them, copied from the host"
        else:
            size, what = min(DEEPSPEED_BUCKET_BYTES, trained_bytes), "DeepSpeed's bucket for gradient reduction"
        return {"communication": Item(size, what)}

    @property
    def num_communicators(self) -> int:
        """NCCL communicators of a rank: fsdp gathers layers on one and sums gradients on another."""
        return 0 if self.world_size == 1 else 2 if self.name == "fsdp" else 1

    def saving(self, trained_bytes: int) -> dict[str, Item]:
        """What a save adds on rank 0's device, when no activations are alive."""
        if self.world_size == 1 or self.optimizer == 1.0:
            return {}
        return {"gathered states": Item(min(GATHER_BYTES, trained_bytes), "optimizer states, in pieces, to be saved")}


def sharing(strategy: str, world_size: int, offload: bool = False, shard_ranks: int | None = None) -> Sharing:
    """Of fsdp, `offload`: of the base; `shard_ranks`: that share one base (None: all). Raises UserError for an unknown
    strategy."""
    if strategy not in STRATEGIES:
        raise UserError(f"strategy.name is {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    shard = 1.0 / world_size
    kinds = {
        "ddp": Sharing(strategy, world_size),
        "fsdp": Sharing(
            strategy, world_size, has_host_base=offload and world_size > 1, shard_ranks=shard_ranks or world_size
        ),
        "zero1": Sharing(strategy, world_size, optimizer=shard, has_master_partition=True),
        "zero2": Sharing(strategy, world_size, gradients=shard, optimizer=shard, has_master_partition=True),
        "zero2_offload": Sharing(strategy, world_size, gradients=0.0, optimizer=shard, is_offloaded=True),
        "zero3": Sharing(
            strategy, world_size, adapters=shard, gradients=shard, optimizer=shard, has_master_partition=True
        ),
    }
    return kinds[strategy]
