"""Writes a wrapper whose text model was changed: the base's own files again, with new tensors where the text model is.

Names, files and every other tensor are the base's, bit for bit, so that what reads the base reads this too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from ...errors import UserError
from ...progress import track
from ..precision import float32_names
from ..pretrained import expanded, where_to_read
from .decoded_files import DecodedFiles
from .safetensors_files import WeightFiles
from .sources import match_names, open_files
from .write_model import write_index, write_tensors

# what belongs to the other towers; transformers' names
BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")


def write_wrapper(
    model: PreTrainedModel,
    weight: Callable[[str], Tensor],
    name: str,
    revision: str | None,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Writes the wrapper `name` into `folder`, one file after another, with the text model's weights from `weight`, by
    their names in `model`, in `dtype`.

    Memory: a weight and what `weight` takes to make it. Raises UserError if the base's files are read by conversion
    only.
    """
    files = open_files(name, revision)
    parts = _parts(model, name, files)
    decoded = files.decoded if isinstance(files, DecodedFiles) else set()
    made: tuple[str, Tensor] | None = None  # the weight that parts are being taken from

    def tensor(key: str) -> Tensor:
        nonlocal made
        if key not in parts:
            stored = files.read(key).view(files.entries[key].shape)
            return stored.to(dtype) if key in decoded else stored
        part = parts[key]
        if made is None or made[0] != part.weight:
            made = None  # freed before the next is made
            made = part.weight, weight(part.weight)
        return made[1] if part.expert is None else made[1][part.expert].narrow(0, part.row, part.num_rows)

    changed, kept = parts.keys() | decoded, float32_names(model, dtype)
    types = {
        key: dtype if key in changed and entry.dtype.is_floating_point else entry.dtype
        for key, entry in files.entries.items()
    }
    types |= {key: torch.float32 for key, part in parts.items() if part.weight in kept}
    empty_of = {key: torch.empty(entry.shape, dtype=types[key], device="meta") for key, entry in files.entries.items()}
    with track("writing tensor", len(empty_of)) as task:
        for path in files.paths:
            empty = {key: empty_of[key] for key, entry in files.entries.items() if entry.path == path}
            # the experts of one stack after another, wherever they are in the file: it is made once
            in_order = sorted(empty, key=lambda key: parts[key].weight if key in parts else "")
            write_tensors(folder / path.name, {key: empty[key] for key in in_order}, tensor, task)
    if len(files.paths) > 1:
        weight_map = {key: entry.path.name for key, entry in files.entries.items()}
        write_index(folder, {"total_size": sum(one.nbytes for one in empty_of.values())}, weight_map)
    _write_config(model, name, revision, folder, dtype)


@dataclass(frozen=True)
class _Part:
    """What a tensor of the files is of the text model."""

    weight: str
    expert: int | None = None  # None: all of it
    row: int = 0
    num_rows: int = 0


def _parts(model: PreTrainedModel, name: str, files: WeightFiles) -> dict[str, _Part]:
    """The files' keys -> what they are of the text model."""
    names, reason = match_names(model, list(files.entries))
    if reason is not None:
        raise UserError(f"model.name {name}: {reason}; nothing can be written in the form of its files")
    parts = {key: _Part(ours) for ours, key in names.key_of.items()}
    for ours, experts in names.stacks.items():
        for expert, keys in enumerate(experts):
            row = 0
            for key in keys:
                num_rows = files.entries[key].shape[0]
                parts[key] = _Part(ours, expert, row, num_rows)
                row += num_rows
    return parts


def _write_config(model: PreTrainedModel, name: str, revision: str | None, folder: Path, dtype: torch.dtype) -> None:
    source = where_to_read(name, revision)
    options: dict[str, Any] = {key: source[key] for key in ("revision", "local_files_only")}
    for file in BESIDE:
        found = cached_file(expanded(name), file, _raise_exceptions_for_missing_entries=False, **options)
        if found is not None:
            shutil.copyfile(found, folder / file)
    path = cached_file(expanded(name), CONFIG_NAME, **options)
    config = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    for part in (config, config.get("text_config") or {}):
        part.pop("torch_dtype", None)
        part.pop("quantization_config", None)  # of files that were decoded
        part["dtype"] = str(dtype).removeprefix("torch.")
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
