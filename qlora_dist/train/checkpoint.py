"""Checkpoints that are complete or absent: written aside, synced, renamed; verified by checksum before use.

    checkpoints/step-00000200/
        adapter_model.safetensors, adapter_config.json   PEFT format (full fine-tuning: weights.safetensors)
        optimizer.safetensors                            flat optimizer states
        state.json                                       step, counts, config, fingerprint of the data, plain numbers
        manifest.json                                    size and SHA-256 of every other file, written last

No random state is stored and none is needed: row order, dropout and learning rate are functions of (seed, step, row),
so a run resumes exactly on any number of ranks. Everything is safetensors or JSON: loading executes nothing.

The trainer calls all functions here on rank 0 only.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import RunFailed, UserError
from ..files import DamagedFolder, check_manifest, folder_aside, remove_folder, write_json, write_manifest

FORMAT = 1
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
_STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint's content, without the weights, which stay in its folder."""

    path: Path
    state: dict[str, Any]
    optimizer_tensors: dict[str, torch.Tensor]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    write_weights: Callable[[Path], None],
    optimizer_tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `folder/step-%08d`, then deletes all but the newest `keep` checkpoints. Returns its path.

    Raises RunFailed when the disk is full or fails; earlier checkpoints are then untouched.
    """
    target = folder / f"step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_interrupted(folder)
        _require_space(folder, optimizer_tensors)
        with folder_aside(target) as aside:  # a rejected one of the same step is replaced
            write_weights(aside)
            save_file(optimizer_tensors, aside / OPTIMIZER)
            write_json(aside / STATE, {"format": FORMAT, "step": step, **state})
            write_manifest(aside, {"format": FORMAT, "step": step})
    except (OSError, SafetensorError) as error:
        good, _ = find_newest(folder)
        raise RunFailed(_save_failure(error, target, good)) from error
    for old in sorted(_complete(folder))[:-keep]:
        remove_folder(old)
    return target


def find_newest(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the newer ones that do not, each with its reason."""
    rejected = []
    for path in sorted(_complete(folder), reverse=True):
        try:
            verify_checkpoint(path)
        except DamagedFolder as error:
            rejected.append((path, str(error)))
        else:
            return path, rejected
    return None, rejected


def verify_checkpoint(path: Path) -> None:
    """Raises DamagedFolder unless every file of the manifest exists with its size and SHA-256."""
    check_manifest(path, {"format": FORMAT})


def load_state(path: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint that `verify_checkpoint` accepted. Raises UserError when it cannot be read."""
    try:
        return Checkpoint(path, load_state(path), load_file(path / OPTIMIZER))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {path}: cannot be read on this host ({error}); several nodes need a shared run_dir"
        ) from None


def remove_interrupted(folder: Path) -> None:
    """Deletes the leftovers of interrupted saves and deletions."""
    for pattern in (".step-*.incomplete*", ".incomplete-step-*"):  # the second: runs started before version 0.2
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]


def _require_space(folder: Path, optimizer_tensors: dict[str, torch.Tensor]) -> None:
    # weights are no larger than Adam's two fp32 states, and larger than 8-bit states only by a constant factor
    needed = 3 * sum(tensor.numel() * tensor.element_size() for tensor in optimizer_tensors.values()) + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:,.0f} MiB may be needed, {free / 2**20:,.0f} MiB are free")


def _save_failure(error: Exception, target: Path, good: Path | None) -> str:
    kept = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
    return (
        f"checkpoint {target} could not be written: {error}. Earlier checkpoints were not touched; {kept}. "
        "Free disk space (or lower train.keep) and start the same command again: it resumes from there"
    )
