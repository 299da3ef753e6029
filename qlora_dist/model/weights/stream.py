"""Streams the base, one weight at a time: host memory never holds the model, nor a whole weight.

The model is built without storage, then each weight is read in pieces, rounded, quantized on the device if it is a
linear layer's, and put in place. With a `ShardGroup` a rank reads and holds only its shard of each.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from ...errors import UserError
from ...progress import track
from ..bitsandbytes_import import bitsandbytes
from ..experts import PackedExperts, pack_experts, packed_experts
from ..precision import keep_float32
from .decoded_files import DecodedFiles
from .quantize import PIECE, Losses, Range, constants_of, make_state, quantize_range
from .sources import FileSource, Stack, WeightSource, match_names, same_in_source

log = logging.getLogger(__name__)


@dataclass
class Skeleton:
    """A model without storage, with its 4-bit layers already in place."""

    model: PreTrainedModel
    quantizer: Any  # transformers' own; None for a plain base
    dtype: torch.dtype
    losses: Losses | None = None  # where files are decoded: what quantizing them again changes

    @property
    def four_bit(self) -> BitsAndBytesConfig | None:
        """Settings of the 4-bit layers."""
        return None if self.quantizer is None else self.quantizer.quantization_config


def build_skeleton(
    config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None, four_bit: BitsAndBytesConfig | None
) -> Skeleton:
    """Parameters on the meta device, buffers (rotary frequencies, ...) computed."""
    config = copy.deepcopy(config)
    stored = getattr(config, "quantization_config", None)
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype, trust_remote_code=False
        )
    keep_float32(model, dtype)
    quantizer = None
    if stored is not None:
        quantizer = AutoHfQuantizer.from_config(stored, pre_quantized=True)
    elif four_bit is not None:
        quantizer = AutoHfQuantizer.from_config(four_bit, pre_quantized=False)
    if quantizer is not None:
        quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
        model.hf_quantizer = quantizer
    skeleton = Skeleton(model, quantizer, dtype)
    settings = skeleton.four_bit
    if settings is not None and settings.load_in_4bit:
        pack_experts(model, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)
    return skeleton


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their storage as they are registered; it was never written to, so it never took memory."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore


def match_files(skeleton: Skeleton, files: Any) -> tuple[FileSource | None, str | None]:
    """(the files under the model's names, the reason why they cannot be streamed): exactly one is None."""
    model = skeleton.model
    names, reason = match_names(model, list(files.entries))
    if reason is not None:
        return None, reason
    key_of = names.key_of
    for target, origin in model.all_tied_weights_keys.items():
        if target in key_of and origin not in key_of:  # stored under the other name of a tied weight
            key_of[origin] = key_of.pop(target)
    # the model's way round, unlike the files'
    transposed = {
        f"{name}.weight" for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D
    }
    transposed |= {name for name, experts in packed_experts(model).items() if experts.is_transposed}
    if isinstance(files, DecodedFiles):
        transposed ^= {name for name, key in key_of.items() if key in files.transposed}
        skeleton.losses = Losses()
    stacked = {name: stack for name, keys in names.stacks.items() if (stack := Stack.of(keys, files)) is not None}
    return FileSource(files, key_of, frozenset(transposed), stacked), None


def resolve_ties(model: PreTrainedModel, source: WeightSource) -> set[str]:
    """Names that need no weight, because they are tied to one in the source.

    Where the source has both and they differ, they are not tied, as in transformers.
    """
    ties: dict[str, str] = model.all_tied_weights_keys
    without: set[str] = set()
    for target, origin in list(ties.items()):
        if target in source.names and not same_in_source(source, target, origin, PIECE):
            log.warning(
                "%s and %s are tied by the config but differ in the files: they stay untied (a memory plan, which "
                "reads the config alone, counts one of them)", target, origin,
            )  # fmt: skip
            ties.pop(target)
        elif origin in source.names:
            without.add(target)
    return without


def check_complete(name: str, model: PreTrainedModel, source: WeightSource, tied: set[str]) -> None:
    """Raises UserError unless the source has every weight with the right shape."""
    missing = []
    for key, module, attribute in each_weight(model, tied):
        shape = tuple(module.shape if isinstance(module, PackedExperts) else getattr(module, attribute).shape)
        if key not in source.names or (source.packed(key) is None and source.shape(key) != shape):
            missing.append(key)
    if missing:
        raise incomplete(name, sorted(missing))


def incomplete(name: str, missing: list[str]) -> UserError:
    """The error for missing weights, which transformers would fill with random numbers."""
    return UserError(
        f"model.name {name}: {len(missing)} weights are missing or have the wrong shape, first {missing[0]}; "
        "the download is incomplete, or the files belong to another model"
    )


# --- one weight -------------------------------------------------------------------------------------------------------


def read_plain(out: Tensor, source: WeightSource, name: str, part: Range) -> None:
    """Reads elements of a weight into `out` (stop - start,), in pieces, rounded to its type."""
    for start in range(part.start, part.stop, PIECE):
        stop = min(part.stop, start + PIECE)
        out[start - part.start : stop - part.start] = source.read(name, start, stop).to(out.device)


def read_4bit(codes: Tensor, source: WeightSource, name: str, layer: Any, skeleton: Skeleton) -> Any:
    """Writes a linear layer's weight to `codes` (weights / 2, 1), read or quantized here; returns its state."""
    shape = (layer.out_features, layer.in_features)
    constants = source.packed(name)
    if constants is not None:
        read_plain(codes.view(-1), source, name, Range(0, codes.numel()))
        return bitsandbytes.functional.QuantState.from_dict(constants, codes.device)
    settings = skeleton.four_bit
    assert settings is not None
    absmax = quantize_range(
        codes,
        lambda start, stop: source.read(name, start, stop),
        Range(0, torch.Size(shape).numel()),
        settings.bnb_4bit_quant_type,
        skeleton.dtype,
        skeleton.losses,
    )
    state = make_state(absmax, shape, settings.bnb_4bit_quant_type, skeleton.dtype, settings.bnb_4bit_use_double_quant)
    if skeleton.losses is not None:
        skeleton.losses.end(constants_of(state))
    return state


def read_experts(
    codes: Tensor, source: WeightSource, name: str, experts: PackedExperts, part: Range, skeleton: Skeleton
) -> dict[str, Tensor]:
    """Writes the experts in `part` into `codes`, read or quantized here; returns all that they consist of.

    Each matrix is quantized as bitsandbytes quantizes it alone: its constants do not depend on the other experts.
    """
    shape, kind, is_nested = experts.shape[1:], experts.quant_type, experts.is_nested
    size = shape.numel()
    tables = make_state(torch.ones(1, device=codes.device), shape, kind, skeleton.dtype, is_nested)
    experts.code = tables.code
    if is_nested:
        experts.nested_code = tables.state2.code
    parts = {"codes": codes} | {
        key: torch.empty((len(codes), value.shape[1]), dtype=value.dtype, device=codes.device)
        for key, value in experts.named_parameters()
        if key != "codes"
    }
    if (stored := source.packed(name)) is not None:
        width = codes.shape[1]
        read_plain(codes.view(-1), source, name, Range(part.start * width, part.stop * width))
        return {"codes": codes} | {
            key: stored[key][part.start : part.stop].to(codes.device) for key in parts if key != "codes"
        }
    for row, expert in enumerate(range(part.start, part.stop)):

        def read(start: int, stop: int, first: int = expert * size) -> Tensor:
            return source.read(name, first + start, first + stop)

        absmax = quantize_range(codes[row].view(-1, 1), read, Range(0, size), kind, skeleton.dtype, skeleton.losses)
        state = make_state(absmax, shape, kind, skeleton.dtype, is_nested)
        if skeleton.losses is not None:
            skeleton.losses.end(constants_of(state))
        parts["absmax"][row] = state.absmax
        if is_nested:
            parts["nested_absmax"][row], parts["offset"][row] = state.state2.absmax, state.offset
    return parts


def empty_buffer(skeleton: Skeleton, module: Any, attribute: str, device: torch.device) -> Tensor:
    """Uninitialized buffer for a weight: packed codes (weights / 2, 1) of a 4-bit layer, those (E, weights / 2) of
    experts, else the weight's shape."""
    if isinstance(module, PackedExperts):
        return torch.empty(module.codes.shape, dtype=torch.uint8, device=device)
    if is_4bit_weight(module, attribute):
        numel = module.out_features * module.in_features
        return torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8, device=device)
    return torch.empty(
        module._parameters[attribute].shape, dtype=plain_dtype(skeleton, module, attribute), device=device
    )


def plain_dtype(skeleton: Skeleton, module: nn.Module, attribute: str) -> torch.dtype:
    """The type of a weight that is not quantized: that of the model, unless its module made it another."""
    parameter = module._parameters[attribute]
    assert parameter is not None
    is_made_by_quantizer = isinstance(module, bitsandbytes.nn.Linear4bit)
    return skeleton.dtype if is_made_by_quantizer else parameter.dtype


def is_4bit_weight(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter is the packed weight of a 4-bit layer."""
    return attribute == "weight" and isinstance(module, bitsandbytes.nn.Linear4bit)


def each_weight(model: nn.Module, without: set[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, module, attribute) of all parameters except `without`, in model order. Experts in 4 bits are one."""
    for prefix, module in model.named_modules():
        if isinstance(module, PackedExperts):
            yield prefix, module, "codes"
            continue
        for attribute, parameter in module._parameters.items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            if parameter is not None and name not in without:
                yield name, module, attribute


# --- the whole model --------------------------------------------------------------------------------------------------


def fill(skeleton: Skeleton, source: WeightSource, tied: set[str], device: torch.device) -> PreTrainedModel:
    """Loads every weight onto the device, and moves the module buffers there."""
    model = skeleton.model
    weights = list(each_weight(model, tied))
    sizes = [weight_size(module, attribute) for _, module, attribute in weights]
    with track("loading the base", sum(sizes), "share") as task:
        # all buffers first: weights and temporaries, allocated alternately, would leave a hole after each weight
        buffers = [empty_buffer(skeleton, module, attribute, device) for _, module, attribute in weights]
        for buffer, size, (name, module, attribute) in zip(buffers, sizes, weights):
            place(buffer, skeleton, source, name, module, attribute)
            task.add(size)
        finish(skeleton, source, tied, device)
    return model


def place(buffer: Tensor, skeleton: Skeleton, source: WeightSource, name: str, module: Any, attribute: str) -> None:
    """Reads one weight into its buffer and puts it into the model."""
    if isinstance(module, PackedExperts):
        for key, part in read_experts(buffer, source, name, module, Range(0, len(buffer)), skeleton).items():
            module.set_part(key, part)
        return
    if is_4bit_weight(module, attribute):
        state = read_4bit(buffer, source, name, module, skeleton)
        module.weight = bitsandbytes.nn.Params4bit(
            buffer,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=torch.uint8,
            bnb_quantized=True,
            module=module,
        )
        module.quant_state = state
        return
    read_plain(buffer.view(-1), source, name, Range(0, buffer.numel()))
    module._parameters[attribute] = nn.Parameter(buffer, requires_grad=False)


def finish(skeleton: Skeleton, source: WeightSource, tied: set[str], device: torch.device) -> None:
    """Ties, module buffers, and the flags that transformers and PEFT check."""
    model = skeleton.model
    model.tie_weights(missing_keys=set(tied), recompute_mapping=False)
    for prefix, module in model.named_modules():
        for attribute, buffer in list(module._buffers.items()):
            if buffer is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            if name in source.names and attribute not in module._non_persistent_buffers_set:
                buffer = source.read(name, 0, buffer.numel()).view(buffer.shape).to(buffer.dtype)
            module._buffers[attribute] = buffer.to(device)
    if skeleton.quantizer is not None:
        skeleton.quantizer.postprocess_model(model)
    model.eval()


def weight_size(module: nn.Module, attribute: str) -> int:
    """Weights of a parameter; 0 where there is none."""
    if isinstance(module, PackedExperts):
        return module.shape.numel()
    parameter = module._parameters[attribute]
    return 0 if parameter is None else parameter.numel()
