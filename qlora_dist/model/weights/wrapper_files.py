"""Writes a wrapper whose text model was changed: the base's own files again, with new tensors where the text model is.

Names, files and every other tensor are the base's, bit for bit, so that what reads the base reads this too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file

from ...errors import UserError
from ..pretrained import expanded, where_to_read
from .decoded_files import DecodedFiles
from .safetensors_files import WeightFiles
from .sources import match_names, open_files

# what belongs to the other towers; transformers' names
BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")


def write_wrapper(model: PreTrainedModel, name: str, revision: str | None, folder: Path) -> None:
    """Writes the wrapper `name` with `model` as its text model into `folder`, one file after another.

    Memory: the model and the tensors of one file. Raises UserError if the base's files are read by conversion only.
    """
    files = open_files(name, revision)
    changed = _changed(model, name, files)
    total = 0
    dtype: Any = model.config.dtype
    for path in files.paths:
        tensors = {
            key: changed[key].contiguous() if key in changed else _kept(files, key, dtype)
            for key, entry in files.entries.items()
            if entry.path == path
        }
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    if len(files.paths) > 1:
        weight_map = {key: entry.path.name for key, entry in files.entries.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    _write_config(model, name, revision, folder)


def _kept(files: WeightFiles, key: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the other towers as it is stored; decoded, if the files are."""
    stored = files.read(key).view(files.entries[key].shape)
    return stored.to(dtype) if isinstance(files, DecodedFiles) and key in files.decoded else stored


def _changed(model: PreTrainedModel, name: str, files: WeightFiles) -> dict[str, Tensor]:
    """The files' keys -> the text model's weights."""
    names, reason = match_names(model, list(files.entries))
    if reason is not None:
        raise UserError(f"model.name {name}: {reason}; nothing can be written in the form of its files")
    state = model.state_dict()
    changed = {key: state[ours] for ours, key in names.key_of.items()}
    for ours, experts in names.stacks.items():
        for matrix, keys in zip(state[ours], experts, strict=True):
            rows = [files.entries[key].shape[0] for key in keys]
            changed.update(zip(keys, matrix.split(rows), strict=True))
    return changed


def _write_config(model: PreTrainedModel, name: str, revision: str | None, folder: Path) -> None:
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
        part["dtype"] = str(model.config.dtype).removeprefix("torch.")
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
