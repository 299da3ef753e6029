"""A 4-bit checkpoint of a 16-bit model, written while that is read: for `qlora-dist quantize` and `model.cache_4bit`.

Stock transformers loads the result, but for stacked experts, which bitsandbytes does not quantize. A folder appears
under its name complete or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from ...cluster.file_lock import build_once
from ...config.json_file import read_json_object
from ...config.model_json import method_of
from ...config.names import model_folder
from ...config.quantization import Quantization
from ...data.tokenizer import expanded, load_tokenizer, where_to_read
from ...errors import MachineFailed, UserError
from ...files import check_manifest, folder_aside, identity, write_manifest
from ...progress import track
from ..bitsandbytes_import import bitsandbytes
from ..experts import PackedExperts, packed_experts
from ..pretrained import decoded_form, find_text_part, load_config, quantization_settings
from .quantize import Range
from .safetensors_files import file_digest
from .sources import WeightSource, open_files, weight_paths
from .stream import (
    Skeleton,
    build_skeleton,
    check_complete,
    each_weight,
    empty_buffer,
    is_4bit_weight,
    match_files,
    read_4bit,
    read_experts,
    read_plain,
    resolve_ties,
    weight_size,
)
from .write_errors import write_errors

log = logging.getLogger(__name__)

SHARD_BYTES = 512 * 2**20  # per file, which is in host memory twice while safetensors serializes it
FORMAT = 1  # part of every fingerprint: increment it when the same inputs give another result
INDEX = "model.safetensors.index.json"
REQUANTIZED = "requantized"  # in its metadata: what was lost, of a model whose files were decoded


def quantize_model(
    name: str,
    out: str | Path,
    *,
    revision: str | None = None,
    quantization: Quantization = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes the 4-bit form of a 16-bit model with its tokenizer into the new folder `out`; returns its size in bytes.

    Memory: twice the tensors of one file (`shard_bytes`, or a larger single weight) and a few pieces of a weight.
    Raises UserError if `out` is not empty, the model is already quantized, or its files must be converted.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty; give a new folder")
    if quantization not in ("nf4", "fp4"):
        raise UserError(f"quantize writes 4-bit checkpoints: nf4 or fp4, not {quantization}")
    config = load_config(name, revision)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = dict(stored).get("quant_method", "unknown")
        raise UserError(f"{name} is already quantized ({method}); give the 16-bit model that it was made from")
    settings = quantization_settings(name, config, quantization, double_quant, compute_dtype)["quantization_config"]
    skeleton = build_skeleton(config, dtype=compute_dtype, attention=None, four_bit=settings)
    skeleton.model.text_part = part = find_text_part(name, revision)  # type: ignore[assignment]
    if part is not None:
        log.info("%s: %s", name, part.describe())
    form = decoded_form(name, revision)
    decoded = None if form is None else method_of(form)
    source, reason = match_files(skeleton, open_files(name, revision))
    if source is None:
        raise UserError(
            f"{name}: its weights cannot be quantized one by one ({reason}); load it in 4 bits with transformers and "
            "call save_pretrained, which needs memory for the whole model"
        )
    tied = resolve_ties(skeleton.model, source)
    check_complete(name, skeleton.model, source, tied)
    if packed_experts(skeleton.model):
        log.warning("%s: stacked experts in 4 bits are read by this package alone, not by stock transformers", out)

    paths = weight_paths(name, revision)
    before = [identity(path.stat()) for path in paths]
    head = _head(name, revision)
    with write_errors(f"writing {out}", "No part of the model was kept"), folder_aside(out, replaces=False) as aside:
        size = _write_weights(skeleton, source, tied, aside, device or torch.device("cpu"), shard_bytes, decoded)
        _write_rest(skeleton, name, revision, aside)
        if [identity(path.stat()) for path in paths] != before:
            raise MachineFailed(
                f"model.name {name}: its weights were written to or replaced while they were being quantized; nothing "
                "was kept. Start the same command again when they are complete"
            )
        write_manifest(aside, head)
    return size


def _head(name: str, revision: str | None) -> dict[str, Any]:
    """What the manifest of a copy says of itself: its format, and of what weights it was made."""
    digest = hashlib.sha256()
    for path in sorted(set(weight_paths(name, revision))):
        digest.update(f"{path.name} {file_digest(path)}".encode())
    return {"format": FORMAT, "source": digest.hexdigest()}


def _write_weights(
    skeleton: Skeleton,
    source: WeightSource,
    tied: set[str],
    folder: Path,
    device: torch.device,
    shard_bytes: int,
    decoded: str | None,
) -> int:
    weight_map: dict[str, str] = {}
    total = 0
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(pending, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, file))
        pending.clear()

    for tensors in _tensors(skeleton, source, tied, device):
        size = sum(tensor.nbytes for tensor in tensors.values())
        if pending and sum(tensor.nbytes for tensor in pending.values()) + size > shard_bytes:
            flush()
        pending.update(tensors)
        total += size
    flush()
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if skeleton.losses is not None and decoded is not None:
        assert skeleton.four_bit is not None
        index["metadata"][REQUANTIZED] = skeleton.losses.describe(decoded, skeleton.four_bit.bnb_4bit_quant_type)
        log.info("%s: %s", folder, index["metadata"][REQUANTIZED])
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def _tensors(
    skeleton: Skeleton, source: WeightSource, tied: set[str], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The tensors of one weight after another, on the CPU, by their names in the file."""
    weights = list(each_weight(skeleton.model, tied))
    with track("quantizing", sum(weight_size(module, one) for _, module, one in weights), "share") as task:
        for name, module, attribute in weights:
            parameter = module._parameters[attribute]
            assert parameter is not None
            if isinstance(module, PackedExperts):
                codes = empty_buffer(skeleton, module, attribute, device)
                parts = read_experts(codes, source, name, module, Range(0, len(codes)), skeleton)
                yield {name if key == "codes" else f"{name}.{key}": value.cpu() for key, value in parts.items()}
                task.add(module.shape.numel())
                continue
            is_packed = is_4bit_weight(module, attribute)
            buffer = empty_buffer(skeleton, module, attribute, device if is_packed else torch.device("cpu"))
            if is_packed:
                state = read_4bit(buffer, source, name, module, skeleton)
                constants = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
                yield {key: value.cpu().contiguous() for key, value in {name: buffer, **constants}.items()}
            else:
                read_plain(buffer.view(-1), source, name, Range(0, buffer.numel()))
                yield {name: buffer}
            task.add(parameter.numel())


def _write_rest(skeleton: Skeleton, name: str, revision: str | None, folder: Path) -> None:
    model = skeleton.model
    skeleton.quantizer.postprocess_model(model)
    model.config.save_pretrained(folder)
    source: dict[str, Any] = where_to_read(name, revision)
    source.pop("trust_remote_code")
    with contextlib.suppress(OSError):  # not every model has one
        GenerationConfig.from_pretrained(expanded(name), **source).save_pretrained(folder)
    with contextlib.suppress(UserError):  # a model may have no tokenizer
        load_tokenizer(name, revision).save_pretrained(folder)


def copied_from(name: str) -> str | None:
    """What a 4-bit copy says of the fp8 or MXFP4 files that it was made from; None for any other model."""
    folder = model_folder(name)
    path = None if folder is None else folder / INDEX
    if path is None or not path.is_file():
        return None
    said = (read_json_object(path, str(path)).get("metadata") or {}).get(REQUANTIZED)
    return said if isinstance(said, str) else None


# --- the cache --------------------------------------------------------------------------------------------------------


def cached_4bit(
    cache_dir: str | Path,
    name: str,
    *,
    revision: str | None = None,
    quantization: Quantization,
    double_quant: bool,
    compute_dtype: torch.dtype,
    device: torch.device,
    is_checked: bool = False,
) -> str:
    """Folder of the model's 4-bit copy, built now if there is none: what `load_base` gets instead of `name`.

    A model that is stored quantized, or not to be in 4 bits, is its own copy. One process builds, others wait for its
    lock. Leftovers of a killed process, copies that changed in any file, and those made before version 0.2, which have
    no digests, are not used but built again. `is_checked`: another process of this node has just called this, so that
    its files need not be hashed again.
    """
    if quantization not in ("nf4", "fp4") or getattr(load_config(name, revision), "quantization_config", None):
        return name
    fingerprint = _fingerprint(name, revision, double_quant, compute_dtype)
    folder = Path(cache_dir).expanduser() / f"{Path(name).name}-{quantization}-{fingerprint}"
    head = _head(name, revision)
    build_once(
        folder,
        check=lambda: check_manifest(
            folder, head, hashing="none" if is_checked else "recorded", required=[INDEX, "config.json"]
        ),
        build=lambda: quantize_model(
            name,
            folder,
            revision=revision,
            quantization=quantization,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            device=device,
        ),
        what="quantizing the same model",
        setting="model.cache_4bit",
    )
    return str(folder)


def _fingerprint(name: str, revision: str | None, double_quant: bool, compute_dtype: torch.dtype) -> str:
    """Of all that determines the copy. Files in the hub cache are named by content; others count with size and time."""
    parts = [f"{FORMAT} {bitsandbytes.__version__} {double_quant} {compute_dtype}"]
    config = Path(expanded(name)) / "config.json"
    if config.is_file():
        parts.append(config.read_text(encoding="utf-8"))
    for path in weight_paths(name, revision):
        real = path.resolve()
        parts.append(f"{real} {real.stat().st_size} {real.stat().st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
