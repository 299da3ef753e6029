"""What fits by the memory plan, for models and cards of known sizes."""

from __future__ import annotations

from collections.abc import Sequence

from docs.parts.markdown import table
from qlora_dist.config import RunConfig, parse_config
from qlora_dist.files import GIB
from qlora_dist.memory import largest_row_tokens
from qlora_dist.memory.families import shapes_from_config
from qlora_dist.memory.gpus import GPUS

_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
         "vocab_size", "max_position_embeddings")  # fmt: skip
# as in the config.json of these models
_MODELS: dict[str, tuple[int, ...]] = {
    "Llama-3.1 8B": (32, 4096, 14336, 32, 8, 128256, 131072),
    "Llama-2 13B": (40, 5120, 13824, 40, 40, 32000, 4096),
    "LLaMA 33B": (60, 6656, 17920, 52, 52, 32000, 2048),
    "LLaMA 65B": (80, 8192, 22016, 64, 64, 32000, 2048),
    "Llama-3.1 70B": (80, 8192, 28672, 64, 8, 128256, 131072),
}
_CARDS = ("l4", "rtx4090", "a100-40", "a6000", "h100", "h200")
_RANK = 64


def fits_on_one() -> str:
    """The longest rows on one card."""
    return _table([(model, "ddp", 1) for model in _MODELS])


def fits_sharded() -> str:
    """The longest rows where the base is sharded."""
    return _table([("Llama-3.1 70B", "fsdp", ranks) for ranks in (2, 4, 8)])


def _table(rows: Sequence[tuple[str, str, int]]) -> str:
    titles = ("model", *(f"{name} ({GPUS[name].device_bytes / GIB:.1f} GiB)" for name in _CARDS))
    return table(
        titles,
        [
            (f"{model}{f', {ranks} GPUs' * (ranks > 1)}", *(_longest(model, card, strategy, ranks) for card in _CARDS))
            for model, strategy, ranks in rows
        ],
    )


def _longest(model: str, card: str, strategy: str, ranks: int) -> str:
    shapes = shapes_from_config({"model_type": "llama", **dict(zip(_KEYS, _MODELS[model], strict=True))})
    assert shapes is not None
    tokens = largest_row_tokens(_config(strategy), shapes, world_size=ranks, device_bytes=GPUS[card].device_bytes)
    if tokens == shapes.max_positions:
        return f"{tokens:,} (all)"
    return f"{tokens:,}" if tokens else "does not fit"


def _config(strategy: str) -> RunConfig:
    return parse_config(
        {
            "run_dir": "run",
            "model": {"name": "a/b"},
            "lora": {"rank": _RANK},
            "data": {"train": [{"path": "c/d"}]},
            "train": {"epochs": 1},
            "memory": {"recompute": "full"},
            "strategy": {"name": strategy},
        }
    )
