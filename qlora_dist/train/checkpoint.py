"""Checkpoints that are complete or absent: written aside, synced, renamed; verified by checksum before use.

    checkpoints/step-00000200/
        adapter_model.safetensors, adapter_config.json   PEFT format (full fine-tuning: weights.safetensors)
        optimizer.safetensors                            flat optimizer states
        state.json                                       step, counts, config, fingerprint of the data, plain numbers
        manifest.json                                    size and SHA-256 of every other file, written last
    checkpoints/rejected-step-00000150/                  damaged: never counted, never used, never deleted
    checkpoints/abandoned-step-00000300/                 newer than the step that the run went on from: the same

No random state is stored and none is needed: row order, dropout and learning rate are functions of (seed, step, row),
so a run resumes exactly on any number of ranks. Everything is safetensors or JSON: loading executes nothing.

The trainer calls all functions here on rank 0 only.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config.run_dir import checkpoint_step
from ..errors import MachineFailed, UserError, os_errors, shortened
from ..files import (
    MANIFEST,
    DamagedFolder,
    Hashing,
    check_manifest,
    folder_aside,
    format_bytes,
    read_manifest,
    remove_folder,
    write_json,
    write_manifest,
)
from ..model.lora_files import CONFIG, WEIGHTS
from .trained_weights import FULL

log = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
_STATE_TYPES = {
    "step": int, "num_tokens": int, "num_labels": int, "config": str, "data_fingerprint": str, "layout": list,
    "optimizer_numbers": dict,
}  # fmt: skip


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

    Only whole checkpoints up to this step count: newer and damaged ones are set aside, and what was just written stays.
    Raises MachineFailed when the disk is full or fails, or memory is used up; earlier checkpoints are then untouched.
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
    except (OSError, SafetensorError, MemoryError) as error:
        raise MachineFailed(_save_failure(error, target)) from error
    try:
        set_aside_newer(folder, target, step, {})
        _rotate(folder, target, keep)
    except (
        OSError,
        MachineFailed,
        UserError,
    ) as error:  # the next save tries again
        log.warning("%s: older checkpoints could not be removed (%s); the new one is whole", target, error)
    assert target.is_dir(), f"rotation removed {target}"
    return target


def _rotate(folder: Path, saved: Path, keep: int) -> None:
    """Leaves `saved` and the newest whole ones before it, `keep` in all; sets aside what may not count."""
    counted = []
    for path in _complete(folder):
        try:
            _check(path, "none")  # sizes only: hashing all of them at each save would take as long as the save
        except DamagedFolder as error:
            if path == saved:
                raise OSError(errno.EIO, f"cannot be read back: {error}", str(saved)) from None
            log.warning("%s", _set_aside(path, "rejected", str(error)))
        else:
            counted.append(path)
    for old in sorted(set(counted) - {saved})[: max(0, len(counted) - keep)]:
        remove_folder(old)


def set_aside_newer(folder: Path, chosen: Path, step: int, rejected: dict[str, str]) -> None:
    """Renames the checkpoints that a run which goes on from `chosen` leaves behind: they are evidence, and never count.

    These are all of later steps, and another one of the same `step`. `rejected`: reasons of the damaged ones by name.
    """
    with os_errors(f"{folder}: a checkpoint could not be set aside", "All checkpoints are still there"):
        for path in sorted(_complete(folder)):
            if checkpoint_step(path) < step or path.resolve() == chosen.resolve():
                continue
            kind = "rejected" if path.name in rejected else "abandoned"
            reason = rejected.get(path.name, f"the run went on from step {step}")
            log.warning("%s", _set_aside(path, kind, reason))


def _set_aside(path: Path, kind: str, reason: str) -> str:
    """Renames a checkpoint so that it does not count. Returns what to tell the user."""
    target, number = path.with_name(f"{kind}-{path.name}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{kind}-{path.name}-{number}")
    path.rename(target)
    return f"checkpoint {path}: {reason}; set aside as {target.name}, which is never used (delete it to free space)"


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
    """Raises DamagedFolder unless the manifest lists exactly the files of a checkpoint, every file has its size and
    SHA-256, and the state has all values, each of its type and of the step that names the folder."""
    _check(path)


def _check(path: Path, hashing: Hashing = "all") -> None:
    try:
        manifest = read_manifest(path)
        weights = [FULL] if FULL in manifest["files"] else [WEIGHTS, CONFIG]
        check_manifest(path, {"format": FORMAT}, hashing=hashing, required=[STATE, OPTIMIZER, *weights])
        _check_state(load_state(path), manifest, checkpoint_step(path))
    except DamagedFolder:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFolder(f"cannot be read ({type(error).__name__}: {shortened(str(error))})") from None


def _check_state(state: Any, manifest: dict[str, Any], folder_step: int) -> None:
    if not isinstance(state, dict):
        raise DamagedFolder(f"{STATE} is not an object")
    for key, kind in _STATE_TYPES.items():
        # not isinstance: True is an int
        if type(state.get(key)) is not kind or (kind is int and state[key] < 0):
            raise DamagedFolder(f"{STATE}: {key} is {shortened(state.get(key))}, expected {kind.__name__}")
    for key, kinds in (("optimizer_numbers", (int, float)), ("sources", (dict,)), ("base_in_memory", (str,))):
        values = state.get(key, {})  # the last two: versions before did not record them
        if not isinstance(values, dict) or any(type(value) not in kinds for value in values.values()):
            raise DamagedFolder(f"{STATE}: {key} has values of a wrong type")
    steps = {"its folder": folder_step, MANIFEST: manifest.get("step"), STATE: state["step"]}
    if folder_step < 0:
        del steps["its folder"]  # a copy under a name of the user's
    if len({shortened(step) for step in steps.values()}) > 1:
        raise DamagedFolder(f"its step differs: {', '.join(f'{shortened(v)} by {k}' for k, v in steps.items())}")


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
    return [path for path in folder.iterdir() if checkpoint_step(path) >= 0 and path.is_dir()]


def _require_space(folder: Path, optimizer_tensors: dict[str, torch.Tensor]) -> None:
    # weights are no larger than Adam's two fp32 states, and larger than 8-bit states only by a constant factor
    needed = 3 * sum(tensor.numel() * tensor.element_size() for tensor in optimizer_tensors.values()) + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{format_bytes(needed)} may be needed, {format_bytes(free)} are free")


def _save_failure(error: Exception, target: Path) -> str:
    good = None
    with suppress(OSError):  # a disk that failed may not answer
        good, _ = find_newest(target.parent)
    kept = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
    is_memory = isinstance(error, MemoryError)
    what, remedy = (
        ("host memory is used up", "Free memory on this host")
        if is_memory
        else (str(error), "Free disk space (or lower train.keep)")
    )
    return (
        f"checkpoint {target} could not be written: {what}. Earlier checkpoints were not touched; {kept}. "
        f"{remedy} and start the same command again: it resumes from there"
    )
