"""A sharded base: each rank holds a part of every large weight, and a layer is whole only while it runs (FSDP2).

    packed codes     (blocks, 32) uint8 parameters, sharded between blocks of 64 weights: each part is quantized alone
    constants        first level as bytes, sharded alike; second level and offset (1/4096 byte per weight) on all ranks
    experts          codes and constants of both levels are sharded by expert: each is quantized alone
    embedding, head  sharded by rows; the embedding is gathered by FSDP2, the head once per loss
    norms, biases    on every rank, as are the adapters, which never pass through FSDP2

Codes never have a float type. The usual recipe stores them as bfloat16 so that FSDP accepts them, and its gather then
copies them as floats, which on CUDA rewrites NaN patterns (pytorch #159333): training silently runs on a different
base. Plain uint8 parameters are gathered byte by byte; each run verifies this once on one layer. FSDP2 does so in every
supported torch, but before 2.12 it cannot shard them: `_shard_layer` works around that.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from ...cluster.shard_group import ShardGroup
from ...config.quantization import BLOCK, NESTED_BLOCK
from ...errors import RunFailed, UserError
from ...progress import track
from ..base_weights import own_part, same_bits
from ..bitsandbytes_import import bitsandbytes
from ..experts import PackedExperts
from ..forward import decoder_layers, gathered, plain_name, unwrap
from .quantize import Range, constants_of, make_state, quantize_range, shard_range
from .sources import WeightSource
from .stream import (
    Skeleton,
    each_weight,
    empty_buffer,
    finish,
    is_4bit_weight,
    place,
    plain_dtype,
    read_4bit,
    read_experts,
    read_plain,
    weight_size,
)

CODES_PER_BLOCK = BLOCK // 2  # bytes
STAND_IN = torch.float8_e5m2  # a one-byte float type, see `_shard_layer`


@dataclass
class Sharded:
    """Kept on a sharded base: its group of ranks and its source."""

    group: ShardGroup
    skeleton: Skeleton
    source: WeightSource


class ShardedLinear4bit(bitsandbytes.nn.Linear4bit):
    """A 4-bit layer whose codes and constants are byte parameters, whole only while its decoder layer runs."""

    codes_shape: torch.Size  # (O, I) of the weight
    quant_type: str
    state_dtype: torch.dtype
    is_nested: bool

    def gathered_state(self) -> Any:
        """The quantization state of the gathered weight. Views: memory that FSDP frees and refills stays attached."""
        functional = bitsandbytes.functional
        absmax, state2 = self.absmax.view(-1), None
        if self.is_nested:
            state2 = functional.QuantState(
                absmax=self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        else:
            absmax = absmax.view(torch.float32)
        return functional.QuantState(
            absmax=absmax,
            shape=self.codes_shape,
            dtype=self.state_dtype,
            blocksize=BLOCK,
            code=self.code,
            quant_type=self.quant_type,
            offset=self.nested_offset if self.is_nested else None,
            state2=state2,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), as bitsandbytes' layer computes on one device."""
        computing = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y = bitsandbytes.matmul_4bit(computing, self.weight.view(-1, 1), bias=bias, quant_state=self.gathered_state())
        return y.to(x.dtype)


# --- building ---------------------------------------------------------------------------------------------------------


def load_sharded(
    skeleton: Skeleton, source: WeightSource, tied: set[str], group: ShardGroup, offload: bool
) -> PreTrainedModel:
    """The base with this rank's part of every large weight on the device, or with `offload` in host memory.

    Raises UserError for families without decoder layers, and for weights that are not a whole number of blocks.
    Raises RunFailed when a large weight was left whole.
    """
    model: Any = skeleton.model
    weights = [(name, module, attribute, weight_size(module, attribute))
               for name, module, attribute in each_weight(model, tied)]  # fmt: skip
    wrap(model, group, offload)
    shard_device = torch.device("cpu") if offload else group.device
    with track("loading this rank's shard of the base", sum(size for *_, size in weights), "share") as task:
        for name, module, attribute, size in weights:
            if isinstance(module, PackedExperts):
                _place_experts(skeleton, source, name, module, group, shard_device)
            elif isinstance(module, ShardedLinear4bit) and attribute == "weight":
                _place_codes(skeleton, source, name, module, group, shard_device)
            elif isinstance(module._parameters[attribute], DTensor):
                _place_rows(skeleton, source, name, module, attribute, group, shard_device)
            else:
                buffer = empty_buffer(skeleton, module, attribute, group.device)
                place(buffer, skeleton, source, name, module, attribute)
            task.add(size)
        finish(skeleton, source, tied, group.device)
    if skeleton.losses is not None:
        parts = group.gather_objects((skeleton.losses.error, skeleton.losses.power))
        skeleton.losses.error, skeleton.losses.power = (sum(column) for column in zip(*parts, strict=True))
    model.sharded = Sharded(group, skeleton, source)
    check_sharding(model)
    return model


def wrap(model: PreTrainedModel, group: ShardGroup, offload: bool) -> None:
    """Shards the parameters before they have storage; puts FSDP2's hooks on decoder layers, embedding and root."""
    layers = decoder_layers(model)
    if not layers:
        raise UserError(f"strategy fsdp: {type(model).__name__} has no decoder layers that can be gathered one by one")
    if getattr(model.config.get_text_config(), "is_heterogeneous", False):
        raise UserError(
            f"strategy fsdp: {type(model).__name__} has layers with settings of their own, and tables and keys that "
            "they share; that these are gathered right has not been shown; use strategy ddp or zero2"
        )
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            _to_bytes(name, module)
        if isinstance(module, PackedExperts) and module.shape[0] % group.size:
            raise UserError(
                f"strategy fsdp shards experts one by one, and {name} has {module.shape[0]} for {group.size} ranks; "
                "use a number of ranks that divides them, or strategy ddp"
            )
    policy = CPUOffloadPolicy(pin_memory=group.device.type == "cuda") if offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": group.mesh, "reshard_after_forward": True, "offload_policy": policy}
    for layer in layers:
        _shard_layer(layer, group, options)
    fully_shard(model.get_input_embeddings(), **options)
    rest = {one for one in model.base_model.parameters() if not isinstance(one, DTensor)}
    fully_shard(model.base_model, ignored_params=rest, **options)  # the root, which shards no parameter itself
    head: Any = model.get_output_embeddings()
    if not isinstance(head.weight, DTensor):
        head.weight = _shard(head.weight, group)
    head.forward = MethodType(_gathered_linear, head)


def _to_bytes(name: str, layer: Any) -> None:
    """Turns a 4-bit layer without storage into one whose weight and constants are rows of bytes, one row per block."""
    shape = torch.Size((layer.out_features, layer.in_features))
    if shape.numel() % BLOCK:
        raise UserError(
            f"strategy fsdp: layer {name} has {shape.numel():,} weights, not a multiple of the quantization block "
            f"size {BLOCK}, and cannot be sharded between blocks; use strategy ddp"
        )
    weight, blocks = layer.weight, shape.numel() // BLOCK
    layer.__class__ = ShardedLinear4bit
    layer.codes_shape, layer.quant_type, layer.is_nested = shape, weight.quant_type, weight.compress_statistics
    rows = {"weight": CODES_PER_BLOCK, "absmax": 1 if layer.is_nested else 4}
    for attribute, width in rows.items():
        empty = torch.empty(blocks, width, dtype=torch.uint8, device="meta")
        layer.register_parameter(attribute, nn.Parameter(empty, requires_grad=False))


def _shard_layer(layer: Any, group: ShardGroup, options: dict[str, Any]) -> None:
    """Shards the large parameters of one decoder layer and puts FSDP2's hooks on it.

    Before torch 2.12 fully_shard makes each parameter require a gradient while sharding it, which bytes cannot (pytorch
    #177844). So a stand-in of a float type replaces the bytes until the layer is sharded. Neither has storage: no code
    is ever a float, and FSDP2 gathers in the type that it finds before the first forward pass. Remove the stand-ins
    when 2.12 is the oldest supported torch.
    """
    empty_bytes = {
        (module, attribute): parameter
        for module in layer.modules()
        for attribute, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype == torch.uint8
    }
    for (module, attribute), empty in empty_bytes.items():
        module._parameters[attribute] = nn.Parameter(empty.to(STAND_IN), requires_grad=False)
    fully_shard(layer, ignored_params={one for one in layer.parameters() if one.ndim < 2}, **options)
    for (module, attribute), empty in empty_bytes.items():
        module._parameters[attribute] = _shard(empty, group)


def _local_rows(num_rows: int, group: ShardGroup) -> tuple[int, int]:
    """(first, last + 1) of this rank's rows, split as by torch.chunk; the last ranks of a short tensor have none."""
    per_rank = -(-num_rows // group.size)
    first, last = (min(num_rows, per_rank * index) for index in (group.rank, group.rank + 1))
    return first, last


def _shard(whole: Tensor, group: ShardGroup) -> nn.Parameter:
    """A sharded parameter without storage, to replace one that every rank has."""
    first, last = _local_rows(len(whole), group)
    sharded = DTensor.from_local(
        whole[first:last].detach(), group.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return nn.Parameter(sharded, requires_grad=False)


def _filled(empty: Any, local: Tensor) -> nn.Parameter:
    """The same parameter with this rank's part. Not by `from_local`, which would move an offloaded part to the GPU."""
    return nn.Parameter(DTensor(local, empty._spec, requires_grad=False), requires_grad=False)


def _place_rows(
    skeleton: Skeleton,
    source: WeightSource,
    name: str,
    module: nn.Module,
    attribute: str,
    group: ShardGroup,
    shard_device: torch.device,
) -> None:
    """This rank's rows of a plain weight."""
    whole: Any = module._parameters[attribute]
    width = whole.shape.numel() // len(whole)
    first, last = _local_rows(len(whole), group)
    local = torch.empty(
        (last - first, *whole.shape[1:]), dtype=plain_dtype(skeleton, module, attribute), device=shard_device
    )
    read_plain(local.view(-1), source, name, Range(first * width, last * width))
    module._parameters[attribute] = _filled(whole, local)


def _place_experts(
    skeleton: Skeleton,
    source: WeightSource,
    name: str,
    experts: PackedExperts,
    group: ShardGroup,
    shard_device: torch.device,
) -> None:
    """This rank's experts."""
    first, last = _local_rows(experts.shape[0], group)
    codes = torch.empty((last - first, experts.codes.shape[1]), dtype=torch.uint8, device=group.device)
    for key, local in read_experts(codes, source, name, experts, Range(first, last), skeleton).items():
        experts.set_part(key, _filled(experts._parameters[key], local.to(shard_device)))


def _place_codes(
    skeleton: Skeleton, source: WeightSource, name: str, layer: Any, group: ShardGroup, shard_device: torch.device
) -> None:
    """This rank's blocks of a 4-bit weight, with the constants that one process computes for the whole.

    The second level needs the constants of all ranks (1/16 byte per weight), which are exchanged here.
    """
    numel = layer.codes_shape.numel()
    part = shard_range(numel, group.rank, group.size)
    codes = torch.empty(((part.stop - part.start) // 2, 1), dtype=torch.uint8, device=group.device)
    stored = source.packed(name)
    if stored is not None:
        read_plain(codes.view(-1), source, name, Range(part.start // 2, part.stop // 2))
        state = bitsandbytes.functional.QuantState.from_dict(stored, group.device)
    else:
        settings = skeleton.four_bit
        assert settings is not None
        own = quantize_range(
            codes,
            lambda start, stop: source.read(name, start, stop),
            part,
            layer.quant_type,
            skeleton.dtype,
            skeleton.losses,
        )
        absmax = group.gather(own, numel // BLOCK)
        state = make_state(absmax, layer.codes_shape, layer.quant_type, skeleton.dtype, layer.is_nested)
        if skeleton.losses is not None:
            skeleton.losses.end(constants_of(state)[part.start // BLOCK : part.stop // BLOCK])
    constants = state.absmax[part.start // BLOCK : part.stop // BLOCK].clone().view(torch.uint8)
    for attribute, local in (("weight", codes), ("absmax", constants)):
        empty = layer._parameters[attribute]
        layer._parameters[attribute] = _filled(empty, local.view(-1, empty.shape[1]).to(shard_device))
    layer.state_dtype = state.dtype
    layer.register_buffer("code", state.code, persistent=False)
    if layer.is_nested:
        layer.register_buffer("nested_absmax", state.state2.absmax, persistent=False)
        layer.register_buffer("nested_code", state.state2.code, persistent=False)
        layer.register_buffer("nested_offset", state.offset, persistent=False)
    # what PEFT reads from a 4-bit weight, and how many weights these bytes represent
    layer.weight.compress_statistics, layer.weight.quant_type = layer.is_nested, layer.quant_type
    layer.weight.num_weights, layer.absmax.num_weights = numel, 0


# --- gathering --------------------------------------------------------------------------------------------------------


def _gathered_linear(head: Any, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, gathered(head.weight), head.bias)


@torch.no_grad()
def check_gathered_layer(model: nn.Module) -> None:
    """Gathers the first decoder layer as a step does and compares it bit for bit with its source, quantized again.

    Called by all ranks after the first forward pass. Raises RunFailed on all of them, naming a weight, when any rank's
    gathered bits differ. An unsharded base passes.
    """
    base: Any = unwrap(model)
    sharded: Sharded | None = getattr(base, "sharded", None)
    if sharded is None:
        return
    layer = decoder_layers(base)[0]  # also an FSDPModule
    prefix = next(name for name, module in base.named_modules() if module is layer)
    layer.unshard()
    wrong = [
        name
        for name, module, attribute in _source_weights(layer, prefix)
        if not _equals_source(sharded, name, module, attribute)
    ]
    layer.reshard()
    found = [name for names in sharded.group.gather_objects(wrong) for name in names]
    if found:
        raise RunFailed(
            f"the gathered weight {found[0]} differs from its source ({len(set(found))} weights of layer {prefix} "
            "differ): every step would use a different base. Do not train with this torch and driver under "
            "strategy fsdp; use ddp"
        )


def _source_weights(layer: nn.Module, prefix: str) -> list[tuple[str, nn.Module, str]]:
    """Sharded weights of a decoder layer by their names in the source, without adapters and PEFT's parts of names."""
    found = []
    for name, module, attribute in each_weight(layer, set()):
        if "lora_" not in name and attribute != "absmax":
            found.append((plain_name(f"{prefix}.{name}"), module, attribute))
    return found


def _equals_source(sharded: Sharded, name: str, module: Any, attribute: str) -> bool:
    """Whether a gathered weight has the bits of its source."""
    skeleton, source, device = sharded.skeleton, sharded.source, sharded.group.device
    value = module._parameters[attribute]
    if isinstance(module, PackedExperts):
        again = read_experts(torch.empty_like(value), source, name, module, Range(0, len(value)), skeleton)
        return all(same_bits(getattr(module, key), part) for key, part in again.items())
    if not is_4bit_weight(module, attribute):
        expected = torch.empty(value.shape, dtype=value.dtype, device=device)
        read_plain(expected.view(-1), source, name, Range(0, expected.numel()))
        return torch.equal(value, expected)
    codes = torch.empty((value.numel(), 1), dtype=torch.uint8, device=device)
    theirs = read_4bit(codes, source, name, module, skeleton)
    ours = module.gathered_state().as_dict(packed=True)
    is_equal = value.dtype == codes.dtype and torch.equal(value.view(-1, 1), codes)
    return is_equal and all(torch.equal(ours[key], constant) for key, constant in theirs.as_dict(packed=True).items())


def check_sharding(model: nn.Module) -> None:
    """Every large weight of a sharded base must be this rank's part only. Raises RunFailed naming one that is not.

    Not a collective: each rank checks what it holds. An unsharded base passes.
    """
    base: Any = unwrap(model)
    sharded: Sharded | None = getattr(base, "sharded", None)
    if sharded is None:
        return
    prefixes = tuple(f"{name}." for name, module in base.named_modules() if module in set(decoder_layers(base)))
    tables = (base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    large = {
        name: value
        for name, value in base.named_parameters()
        if any(value is table for table in tables)
        or (value.ndim > 1 and name.startswith(prefixes) and "lora_" not in name)
    }
    whole = {
        name: own_part(value).nbytes
        for name, value in large.items()
        if not isinstance(value, DTensor) or len(own_part(value)) > -(-len(value) // sharded.group.size)
    }
    if whole:
        name, size = max(whole.items(), key=lambda item: item[1])
        raise RunFailed(
            f"strategy fsdp: {len(whole)} large weights are whole on rank {sharded.group.rank} instead of sharded "
            f"over {sharded.group.size} ranks, such as {name} with {size:,} bytes: the planned memory is not saved. "
            "Use another torch, or strategy ddp"
        )
