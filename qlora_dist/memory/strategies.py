"""What each strategy keeps on a rank: shares of weights, gradients and optimizer states, and its buffers."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .constants import Item

STRATEGIES = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp")
BUCKET_BYTES = 32 * 2**20  # optim.reducer.BUCKET_BYTES
DEEPSPEED_BUCKET_BYTES = 4 * 16_777_216  # ds_configs/*.json: reduce_bucket_size elements of fp32; no second one fills
GATHERED_LAYERS = 2  # the one that computes, and the next, which is fetched meanwhile


@dataclass(frozen=True)
class Sharing:
    """Shares that one rank holds."""

    name: str
    world_size: int
    adapters: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0
    is_offloaded: bool = False  # optimizer states live on the host
    has_master_partition: bool = False  # DeepSpeed clones the share of weights that it updates

    def base(self, quantization: str) -> float:
        """Share of the linear layers' weights that stays on a rank."""
        # under ZeRO-3 quantized weights are not partitioned at init
        is_sharded = self.name == "fsdp" or (self.name == "zero3" and quantization == "none")
        return 1.0 / self.world_size if is_sharded else 1.0

    @property
    def tables(self) -> float:
        """Share of the embedding and the head that stays on a rank."""
        return 1.0 / self.world_size if self.name == "fsdp" else 1.0

    def buffers(self, trained_bytes: int, layer_bytes: int, head_bytes: int) -> dict[str, Item]:
        """What exists only because there are several ranks. `layer_bytes`: base weights of one decoder layer."""
        if self.world_size == 1 and self.name in ("ddp", "fsdp"):
            return {}
        if self.name == "ddp":
            # buckets are views of the gradients; the look whether they are finite makes |x| and two masks
            size, what = min(BUCKET_BYTES, trained_bytes) * 6 // 4, "a bucket's look for values that are not finite"
        elif self.name in ("fsdp", "zero3"):
            size = max(GATHERED_LAYERS * layer_bytes, head_bytes)
            what = f"{GATHERED_LAYERS} gathered layers, one of them fetched ahead; or the head, for the loss"
        else:
            size, what = min(DEEPSPEED_BUCKET_BYTES, trained_bytes), "DeepSpeed's bucket of gradients to be reduced"
        return {"communication": Item(size, what)}


def sharing(strategy: str, world_size: int) -> Sharing:
    """Raises UserError for a strategy that is not known."""
    if strategy not in STRATEGIES:
        raise UserError(f"strategy.name is {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    part = 1.0 / world_size
    kinds = {
        "ddp": Sharing(strategy, world_size),
        "fsdp": Sharing(strategy, world_size),
        "zero1": Sharing(strategy, world_size, optimizer=part, has_master_partition=True),
        "zero2": Sharing(strategy, world_size, gradients=part, optimizer=part, has_master_partition=True),
        "zero2_offload": Sharing(strategy, world_size, gradients=0.0, optimizer=part, is_offloaded=True),
        "zero3": Sharing(
            strategy, world_size, adapters=part, gradients=part, optimizer=part, has_master_partition=True
        ),
    }
    return kinds[strategy]
