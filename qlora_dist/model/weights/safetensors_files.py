"""Weights in safetensors files, read piece by piece into ordinary memory.

A memory map of a whole file counts as memory of the process that touches it, and keeps every touched page; here only
the requested piece is ever held. The system's page cache is shared by all processes of a node, so a file that several
ranks read is read from disk once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LARGEST_HEADER = 100 * 2**20  # bytes; the format's limit
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise BadFile(f"{path} is not a safetensors file: its header is not JSON") from None
    entries = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        dtype = TYPES.get(tensor["dtype"])
        if dtype is None:
            raise BadFile(f"{path}: {name} has the type {tensor['dtype']}, which is not supported")
        start, stop = tensor["data_offsets"]
        entry = Entry(path, dtype, tuple(tensor["shape"]), 8 + length + start)
        if 8 + length + stop > size or stop - start != entry.numel * dtype.itemsize:
            raise BadFile(f"{path}: {name} is not where the header places it; the file is truncated or damaged")
        entries[name] = entry
    return entries
