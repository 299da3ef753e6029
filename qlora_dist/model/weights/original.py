"""One weight as stored in the files, to check the one in memory: read independently of the model's loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from ...config.quantization import BLOCK
from ..bitsandbytes_import import bitsandbytes
from ..forward import is_4bit
from ..pretrained import expanded, load_config, where_to_read

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_source_weight(name: str, revision: str | None, key: str) -> Tensor | None:
    """A tensor of the base's files by the model's own name for it; None where the files use another name."""
    index = _file(name, revision, INDEX)
    if index is not None:
        files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    else:
        single = _file(name, revision, SINGLE)
        if single is None:
            return None
        with safe_open(single, framework="pt") as opened:
            files = dict.fromkeys(opened.keys(), SINGLE)
    short = key.partition(".")[2]  # some files store the decoder without the model's prefix: layers.0... h.0...
    found = next((one for one in (key, short) if one in files), None)
    path = _file(name, revision, files[found]) if found is not None else None
    if path is None or found is None:
        return None
    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(found)


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
    return next((part for part, (live, again) in pairs.items() if not _same_bytes(live, again)), None)


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    flat_left, flat_right = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right))
    return torch.equal(flat_left, flat_right)


def _file(name: str, revision: str | None, file: str) -> str | None:
    where = where_to_read(name, revision)
    return cached_file(
        expanded(name),
        file,
        revision=where["revision"],
        local_files_only=where["local_files_only"],
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
