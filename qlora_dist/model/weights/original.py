"""One weight as stored in the files, to check the one in memory: read independently of the model's loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...config.quantization import BLOCK
from ...errors import UserError
from ..base_weights import same_bits
from ..bitsandbytes_import import bitsandbytes
from ..experts import PackedExperts, packed_experts
from ..forward import is_4bit
from ..pretrained import decoded_form, load_config
from ..text_part import TextPart
from .decoded_files import SCALE
from .safetensors_files import BadFile
from .sources import open_files, weight_paths
from .stream import Skeleton, match_files


def read_source_weight(name: str, revision: str | None, key: str, part: TextPart | None = None) -> Tensor | None:
    """A tensor of the base's files by the model's own name for it; None where the files use another name.

    `part`: the model is that part of a wrapper, whose files have one of several forms of names.
    """
    short = key.partition(".")[2]  # some files store the decoder without the model's prefix: layers.0... h.0...
    names = [key, short] if part is None else [part.in_wrapper(key), f"language_model.{key}", key]
    try:
        paths = weight_paths(name, revision)
    except (OSError, BadFile):  # a hub that does not answer now: the loader had the files
        return None
    found = _find(paths, names)
    if found is None or not found.dtype.is_floating_point or found.dtype.itemsize > 1:
        return found
    scales = _find(paths, [f"{one}{SCALE}" for one in names])
    form = decoded_form(name, revision)
    return None if scales is None or form is None else _decoded(found, scales, form.get("weight_block_size"))


def _find(paths: list[Path], names: list[str]) -> Tensor | None:
    for path in paths:
        with safe_open(path, framework="pt") as opened:
            found = next((one for one in names if one in opened.keys()), None)  # noqa: SIM118  (not a dict)
            if found is not None:
                return opened.get_tensor(found)
    return None


def _decoded(weight: Tensor, scales: Tensor, block: list[int] | None) -> Tensor:
    """(O, I) fp32 of an fp8 weight at once: unlike the loader's reading in pieces."""
    wide = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    wide = wide.view(1, 1) if wide.ndim < 2 else wide
    for dim, size in enumerate(weight.shape):
        repeats = -(-size // wide.shape[dim])
        if block is not None and wide.shape[dim] == -(-size // block[dim]):
            repeats = block[dim]
        wide = wide.repeat_interleave(repeats, dim)
    return weight.float() * wide[: weight.shape[0], : weight.shape[1]]


def read_source_expert(model: Any, name: str, revision: str | None, key: str, expert: int) -> Tensor | None:
    """(O, I): one expert's matrix of stacked experts, which files hold stacked or one by one."""
    shape = packed_experts(model)[key].shape[1:]
    try:
        source, _ = match_files(Skeleton(model, None, torch.float32), open_files(name, revision))
    except UserError:
        return None
    if source is None or key not in source.names:
        return None
    return source.read(key, expert * shape.numel(), (expert + 1) * shape.numel()).view(shape)


def same_expert(experts: PackedExperts, expert: int, source: Tensor, compute_dtype: torch.dtype) -> str | None:
    """Quantizes one expert's matrix at once and compares; returns the name of the first part that differs."""
    codes, state = bitsandbytes.functional.quantize_4bit(
        source.to(device=experts.codes.device, dtype=compute_dtype).contiguous(),
        blocksize=BLOCK,
        compress_statistics=experts.is_nested,
        quant_type=experts.quant_type,
        quant_storage=torch.uint8,
    )
    expected = {"codes": codes, "absmax": state.absmax}
    if experts.is_nested:
        expected |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
    live = {part: getattr(experts, part)[expert] for part in expected}
    return next((part for part, value in expected.items() if not same_bits(live[part], value.flatten())), None)


def has_quantized_files(name: str, revision: str | None) -> bool:
    """Whether the files contain quantized weights, which are read as they are."""
    return getattr(load_config(name, revision), "quantization_config", None) is not None


def same_as_quantized(layer: nn.Module, source: Tensor, compute_dtype: torch.dtype) -> str | None:
    """Quantizes a source weight on the layer's device and compares; returns the name of the first part that differs.

    Parts are the packed codes and the constants (of both levels with double quantization), compared bit for bit.
    """
    assert is_4bit(layer)
    weight: Any = layer.weight
    state = weight.quant_state
    if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D):
        source = source.T
    # load_base rounds to the compute type first
    rounded = source.to(device=weight.device, dtype=compute_dtype).contiguous()
    codes, expected = bitsandbytes.functional.quantize_4bit(
        rounded,
        blocksize=state.blocksize or BLOCK,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=torch.uint8,
    )
    pairs = {"codes": (weight.data, codes), "constants": (state.absmax, expected.absmax)}
    if state.nested:
        pairs |= {
            "nested constants": (state.state2.absmax, expected.state2.absmax),
            "offset": (state.offset, expected.offset),
        }
    is_same = {part: same_bits(live.flatten(), again.flatten()) for part, (live, again) in pairs.items()}
    return next((part for part, same in is_same.items() if not same), None)
