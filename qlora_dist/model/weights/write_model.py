"""Writes a model as `save_pretrained` does, holding one weight at a time instead of the model.

Names, files and index are transformers' own: which tensors a weight becomes (experts are unstacked, names put back) is
asked of its rules on tensors without storage, and then done weight by weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ...progress import Task, track
from ..precision import float32_names
from .safetensors_files import TYPES

FILE_PATTERN = "model{suffix}.safetensors"
_NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A tensor of the files."""

    weight: str  # of the model, which it is, or is a part of
    empty: Tensor  # its type and shape


def pieces_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Piece] | None:
    """The tensors that `save_pretrained` would write, by name; None where several weights become one of them."""
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    kept = float32_names(model, dtype)

    def type_of(name: str, value: Tensor) -> torch.dtype:
        if not value.is_floating_point():
            return value.dtype
        return torch.float32 if name in kept else dtype

    empty = {
        name: torch.empty(value.shape, dtype=type_of(name, value), device="meta")
        for name, value in model.state_dict().items()
        if name not in left_out
    }
    expected = revert_weight_conversion(model, empty)
    pieces = {
        key: Piece(name, part)
        for name, value in empty.items()
        for key, part in revert_weight_conversion(model, {name: value}).items()
    }
    is_same = pieces.keys() == expected.keys() and all(
        pieces[key].empty.shape == value.shape for key, value in expected.items()
    )
    return {key: pieces[key] for key in expected} if is_same else None


def write_model(
    model: PreTrainedModel, weight: Callable[[str], Tensor], folder: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    """Writes config and weights into `folder`; `weight` returns each in its final type, by name.

    Memory: a weight and what `weight` takes to make it. Where several weights become one tensor: the whole model.
    """
    config: Any = model.config
    config.dtype = dtype
    pieces = pieces_of(model, dtype)
    if pieces is None:
        state = {name: weight(name) for name in model.state_dict() if name not in model.all_tied_weights_keys}
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        return
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    split = split_torch_state_dict_into_shards(
        {key: piece.empty for key, piece in pieces.items()},
        filename_pattern=FILE_PATTERN,
        max_shard_size=max_shard_size,
    )
    made: tuple[str, dict[str, Tensor]] = ("", {})  # the weight that pieces are being taken from

    def tensor(key: str) -> Tensor:
        nonlocal made
        name = pieces[key].weight
        if made[0] != name:
            made = ("", {})  # freed before the next is made
            made = name, revert_weight_conversion(model, {name: weight(name)})
        return made[1][key]

    with track("writing tensor", len(pieces)) as task:
        for file, keys in split.filename_to_tensors.items():
            write_tensors(folder / file, {key: pieces[key].empty for key in keys}, tensor, task)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        write_index(folder, metadata, split.tensor_to_filename)


def write_index(folder: Path, metadata: Mapping[str, Any], weight_map: Mapping[str, str]) -> None:
    """Which file has which tensor."""
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(f"{text}\n", encoding="utf-8")


def write_tensors(path: Path, empty: Mapping[str, Tensor], tensor: Callable[[str], Tensor], task: Task) -> None:
    """Writes a safetensors file of tensors with these types and shapes, each of which is asked for when it is written.

    The library's own writer needs them all at once, and then as much memory again.
    """
    keys = sorted(empty, key=lambda key: -empty[key].dtype.itemsize)  # so that each is aligned to its type
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        start, end = end, end + empty[key].nbytes
        header[key] = {
            "dtype": _NAMES[empty[key].dtype],
            "shape": list(empty[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            value = tensor(key)
            assert value.dtype == empty[key].dtype and value.shape == empty[key].shape, f"{key} is not as announced"
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            task.add()
