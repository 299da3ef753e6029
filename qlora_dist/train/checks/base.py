"""The frozen base: the promised number of bytes, the bits of the files, and none of them changed since.

Everything here inspects this rank's tensors only; of a sharded base that is its shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...config.quantization import Quantization, quantized_bytes
from ...errors import RunFailed
from ...files import format_bytes
from ...model import (
    decoder_layers,
    is_4bit,
    linear_layers,
    load_config,
    own_part,
    packed_experts,
    plain_name,
    stacked_experts,
    text_part,
    unwrap,
)
from ...model.check_config import build_on_meta
from ...model.experts import expert_matrices
from ...model.precision import keep_float32
from ...model.weights.original import (
    has_quantized_files,
    read_source_expert,
    read_source_weight,
    same_as_quantized,
    same_expert,
)

# --- how many bytes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseBytes:
    """Bytes of the base, from config.json alone."""

    matrices: int  # codes, embedding, head, other matrices that are not quantized
    constants: int  # of the first level
    vectors: int  # norms, biases
    nested: int  # constants of the second level

    def on_each_rank(self, strategy: str = "ddp", num_ranks: int = 1) -> int:
        """What one rank holds: everything; under fsdp a shard of matrices and constants, under zero3 of all weights."""
        cut, whole = 0, self.matrices + self.constants + self.vectors + self.nested
        if strategy == "fsdp":
            cut = self.matrices + self.constants
        elif strategy == "zero3":
            cut = self.matrices + self.vectors
        return -(-cut // num_ranks) + whole - cut


def promised_base_bytes(
    name: str,
    *,
    revision: str | None = None,
    quantization: Quantization,
    double_quant: bool,
    dtype: torch.dtype,
    has_own_head: bool = False,
) -> BaseBytes:
    """Bytes by the shapes: half a byte per 4-bit weight, plus its constants; `dtype` for what is not quantized.

    `has_own_head`: the files hold an output head besides the embedding, whatever the config says of the two.
    """
    config = load_config(name, revision)
    skipped = _skipped_modules(config)
    model = build_on_meta(name, config)
    keep_float32(model, dtype)
    layers: dict[str, Any] = linear_layers(model)
    quantized = {  # -> outputs
        id(layer.weight): getattr(layer, "out_features", None) or layer.nf
        for key, layer in layers.items()
        if quantization != "none" and not any(part in key for part in skipped)
    }
    stacked = {  # id of a weight of stacked experts -> their number
        id(parameter): len(parameter)
        for experts in stacked_experts(model).values()
        for parameter, _ in expert_matrices(experts)
        if quantization in ("nf4", "fp4")
    }
    parts = [*decoder_layers(model), model.get_input_embeddings(), model.get_output_embeddings()]
    sharded = {id(parameter) for part in parts for parameter in part.parameters()}  # not a table of positions
    matrices = constants = vectors = nested = 0
    for parameter in model.parameters():  # tied weights come once
        outputs = quantized.get(id(parameter))
        if (count := stacked.get(id(parameter))) is not None:
            one = quantized_bytes(parameter[0].numel(), parameter.shape[1], quantization, double_quant)
            matrices, constants = matrices + count * one.codes, constants + count * one.constants
            # an expert's second level is sharded with it, and so is its mean of the constants
            constants += count * (one.nested + (4 if double_quant else 0))
        elif outputs is not None:
            one = quantized_bytes(parameter.numel(), outputs, quantization, double_quant)
            matrices, constants, nested = matrices + one.codes, constants + one.constants, nested + one.nested
        else:
            width = max(dtype.itemsize, parameter.element_size())  # more than its share: kept in fp32
            if parameter.ndim > 1 and id(parameter) in sharded:
                matrices += parameter.numel() * width
            else:
                vectors += parameter.numel() * width
    head: torch.Tensor = model.get_output_embeddings().weight
    if has_own_head and head is model.get_input_embeddings().weight:
        matrices += head.numel() * dtype.itemsize
    return BaseBytes(matrices, constants, vectors, nested)


def check_base_bytes(held: list[tuple[str, int]], promised: int, strategy: str, slack: float = 0.01) -> None:
    """Raises RunFailed unless every rank's base has the promised bytes, within `slack`. `held`: (host, bytes) by rank.

    A base left in 16 bits, loaded twice, or not sharded would otherwise show as an out-of-memory error hours later,
    or never.
    """
    wrong = [
        f"rank {rank} ({host}) holds {format_bytes(num_bytes)}"
        for rank, (host, num_bytes) in enumerate(held)
        if abs(num_bytes - promised) > slack * promised + 4096
    ]
    if wrong:
        raise RunFailed(
            f"strategy {strategy} promises {format_bytes(promised)} of base weights on each rank, but "
            f"{'; '.join(wrong[:4])}{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}: the base is not "
            "quantized or not sharded as model.quantization and strategy.name require. Nothing was trained"
        )


def check_storage(
    model: nn.Module, name: str, *, revision: str | None = None, quantization: Quantization, dtype: torch.dtype
) -> None:
    """Raises RunFailed naming a weight that is stored wider than promised: a linear layer or experts that are not
    quantized, a table wider than `dtype`. In a large model one layer is within the slack of `check_base_bytes`.
    """
    base = unwrap(model)
    skipped = _skipped_modules(load_config(name, revision))
    narrow: dict[str, tuple[str, Any, int]] = {  # name -> (kind, weight, bytes of an element that are allowed)
        f"{key}.weight": ("linear layer", layer.weight, 1)
        for key, layer in linear_layers(base).items()
        if quantization != "none" and "lora_" not in key and not any(part in key for part in skipped)
    }
    if quantization in ("nf4", "fp4"):
        for key, experts in stacked_experts(base).items():
            narrow |= {
                f"{key}.{part}": ("experts", value, 1) for part, value in experts.named_parameters(recurse=False)
            }
    tables: dict[str, Any] = {"input": base.get_input_embeddings(), "output": base.get_output_embeddings()}
    narrow |= {f"the {key} table": ("table", table.weight, dtype.itemsize) for key, table in tables.items()}
    wide = [
        (kind, plain_name(key), own_part(weight).dtype)
        for key, (kind, weight, allowed) in narrow.items()
        if own_part(weight).dtype.itemsize > allowed
    ]
    if wide:
        (kind, key, found), *rest = wide
        more = f" and {len(rest):,} more weights" if rest else ""
        raise RunFailed(
            f"{kind} {key}{more}: stored in {found}, but model.quantization {quantization} and compute_dtype {dtype} "
            "promise less: the base is larger than planned, and is not what would be trained. Nothing was trained"
        )


def _skipped_modules(config: Any) -> tuple[str, ...]:
    """Parts of names of layers that files in 4 bits hold in 16."""
    return tuple((getattr(config, "quantization_config", None) or {}).get("llm_int8_skip_modules") or ())


# --- which bits -------------------------------------------------------------------------------------------------------


def check_source_bits(
    model: nn.Module, name: str, *, revision: str | None = None, compute_dtype: torch.dtype, seed: int = 0
) -> str:
    """Quantizes one layer again from the files and compares it with the one in memory, bit by bit. Returns what it did.

    Raises RunFailed when they differ. For a base whose layers are whole on this rank; a sharded one must be gathered
    first.
    """
    layers: dict[str, Any] = {key: layer for key, layer in linear_layers(model).items() if is_4bit(layer)}
    if not layers:
        return "the base is not in 4 bits"
    if has_quantized_files(name, revision):
        return "the files hold quantized weights, which are read as they are"
    said = _check_linear(model, layers, name, revision, compute_dtype, seed)
    return said if not packed_experts(model) else f"{said}; {_check_expert(model, name, revision, compute_dtype, seed)}"


def _check_expert(model: Any, name: str, revision: str | None, compute_dtype: torch.dtype, seed: int) -> str:
    base = unwrap(model)
    packed = packed_experts(base)
    key = sorted(packed)[seed % len(packed)]
    expert = seed % packed[key].shape[0]
    source = read_source_expert(base, name, revision, key, expert)
    if source is None:
        return f"the files hold {key} under another name or shape"
    part = same_expert(packed[key], expert, source, compute_dtype)
    if part is not None:
        raise RunFailed(_differs(f"expert {expert} of {key}", part, name))
    return f"expert {expert} of {key} as well"


def _differs(weight: str, part: str, name: str) -> str:
    return (
        f"{weight}: its {part} in memory differ from those of its quantized source in {name}; the base was changed "
        "while it was loaded. Nothing was trained; check the files and the installed versions"
    )


def _check_linear(
    model: nn.Module, layers: dict[str, Any], name: str, revision: str | None, compute_dtype: torch.dtype, seed: int
) -> str:
    key = sorted(layers)[seed % len(layers)]
    plain = plain_name(f"{key}.weight")
    source = read_source_weight(name, revision, plain, text_part(model))
    if source is None or source.numel() != torch.Size(layers[key].weight.quant_state.shape).numel():
        return f"the files hold {plain} under another name or shape"
    part = same_as_quantized(layers[key], source, compute_dtype)
    if part is not None:
        raise RunFailed(_differs(f"layer {plain}", part, name))
    return f"{plain} is bit-equal to its quantized source"


def check_base_unchanged(changed: list[tuple[str, bool]], when: str) -> None:
    """Raises RunFailed when any rank's base differs from what was loaded. `changed`: (host, whether it did) by rank."""
    ranks = [f"rank {rank} ({host})" for rank, (host, is_changed) in enumerate(changed) if is_changed]
    if ranks:
        raise RunFailed(
            f"{when}: the frozen base has changed since it was loaded on {', '.join(ranks)}: its checksum differs, so "
            "the adapter is being trained against another model. This state was not saved, earlier checkpoints are "
            "unaffected; find out what writes to base weights, or check for faulty memory"
        )
