"""Weights in safetensors files, read piece by piece into ordinary memory.

A memory map of a whole file counts as memory of the process that touches it, and keeps every touched page; here only
the requested piece is ever held. The system's page cache is shared by all processes of a node, so a file that several
ranks read is read from disk once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...errors import shortened
from ...files import sha256

LARGEST_HEADER = 100 * 2**20  # bytes; the format's limit
WHOLE_BYTES = 2**28  # files up to this size are hashed whole
BLOCK, NUM_BLOCKS = 2**12, 16  # of each tensor in a larger one: bytes, and how many, evenly spaced
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class BadFile(ValueError):
    """A file that is not a complete safetensors file. The message names the file and the problem."""


@dataclass(frozen=True)
class Entry:
    """Location of one tensor."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class WeightFiles:
    """The tensors of one or more safetensors files, by name. Raises BadFile if one is truncated or not safetensors."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = tuple(paths)
        self.entries: dict[str, Entry] = {}
        for path in self.paths:
            self.entries |= _read_header(path)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """(stop - start,) elements of a tensor in storage order, on the CPU, in the stored type."""
        entry = self.entries[name]
        stop = entry.numel if stop is None else stop
        assert 0 <= start <= stop <= entry.numel, f"{name}: {start} to {stop} of {entry.numel} elements"
        size = entry.dtype.itemsize
        return self.read_bytes(name, start * size, stop * size).view(entry.dtype)

    def read_bytes(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) bytes of a tensor, whatever its type, uint8 on the CPU."""
        entry = self.entries[name]
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        if buffer.numel():
            with open(entry.path, "rb", buffering=0) as file:
                file.seek(entry.start + start)
                _read_into(file, buffer.numpy().data, entry.path)
        return buffer


def _read_into(file: object, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise BadFile(f"{path} ended early: it is truncated")
        done += count


def _read_header(path: Path) -> dict[str, Entry]:
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise BadFile(f"{path} is not a safetensors file, or truncated")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} is not a safetensors file: its header is not JSON ({shortened(str(error))})") from None
    if not isinstance(header, dict):
        raise BadFile(f"{path}: the header is {shortened(header)}; expected an object with one entry for each tensor")
    entries = {
        name: _checked_entry(path, name, entry, 8 + length, size - 8 - length)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_overlaps(path, entries)
    return entries


def _checked_entry(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> Entry:
    """One tensor of a header, of any form. Raises BadFile naming the file, the tensor and what is wrong."""
    where = f"{path}: {shortened(name)}"
    if not isinstance(entry, dict):
        raise BadFile(f"{where} is {shortened(entry)}; expected an object with dtype, shape and data_offsets")
    found, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = TYPES.get(found) if isinstance(found, str) else None
    if dtype is None:
        raise BadFile(f"{where} has the type {shortened(found)}, which is not supported")
    if not _are_counts(shape):
        raise BadFile(f"{where} has the shape {shortened(shape)}; expected a list of numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise BadFile(f"{where} has the data_offsets {shortened(offsets)}; expected where it starts and ends")
    start, stop = offsets
    if not start <= stop <= data_bytes or stop - start != math.prod(shape) * dtype.itemsize:
        raise BadFile(f"{where} is not where the header places it; the file is truncated or damaged")
    return Entry(path, dtype, tuple(shape), data_start + start)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)


def _check_overlaps(path: Path, entries: dict[str, Entry]) -> None:
    ordered = sorted(
        (entry.start, entry.start + entry.numel * entry.dtype.itemsize, name) for name, entry in entries.items()
    )
    for (_, end, name), (start, _, other) in pairwise(ordered):
        if start < end:
            raise BadFile(f"{path}: {shortened(name)} and {shortened(other)} overlap; the file is damaged")


def file_digest(path: Path) -> str:
    """Of a whole file; of a large one of weights, of its tensors' names, types, shapes, and of a part of each.

    Reads at most 256 MiB, or 64 KiB of each tensor. Raises OSError, BadFile.
    """
    if path.stat().st_size <= WHOLE_BYTES or path.suffix != ".safetensors":
        return sha256(path)
    digest, files = hashlib.sha256(), WeightFiles([path])
    for name, entry in sorted(files.entries.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        size = entry.numel * entry.dtype.itemsize
        for start in range(0, size, max(BLOCK, size // NUM_BLOCKS)):
            digest.update(files.read_bytes(name, start, min(size, start + BLOCK)).numpy().data)
    return f"sampled {digest.hexdigest()}"
