"""Files whose weights are 8-bit or 4-bit floats with scales, as other tools train and serve them: read as fp32.

    fp8     `X` float8_e4m3fn and `X_scale_inv`, one scale for each block of rows and columns (DeepSeek-V3, Qwen3-*-FP8)
    mxfp4   `X_blocks` (E, O, I / 32, 16) uint8, two values a byte, `X_scales` (E, O, I / 32), powers of two (gpt-oss)

They are decoded piece by piece in fp32, with the bits of transformers' own dequantization, and are then what any plain
weight is: rounded to the model's type, quantized as configured. A weight has one name here, and its scales have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.model_json import method_of
from .safetensors_files import BadFile, Entry, WeightFiles

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
GROUP = 32  # weights of MXFP4 that share a scale
_OTHER_SCALES = (".scale", ".qscale_weight")  # names that some releases use for `.weight_scale_inv`
_SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e8m0fnu)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_PAIRS = torch.tensor([[(*_E2M1, *(-value for value in _E2M1))[code] for code in (byte & 15, byte >> 4)]
                            for byte in range(256)])  # fmt: skip


@dataclass(frozen=True)
class _Blocks:
    """A weight (..., R, C) whose blocks of (rows, columns) have a scale each: (..., cells down, cells across)."""

    rows: int
    columns: int
    down: int
    across: int


class DecodedFiles(WeightFiles):
    """The tensors of files of the form `stored`, config.json's `quantization_config`. Raises BadFile."""

    def __init__(self, paths: Iterable[Path], stored: dict[str, Any]) -> None:
        super().__init__(paths)
        self.method = method_of(stored)
        self.decoded: set[str] = set()
        self.transposed: set[str] = set()  # stored (E, O, I), where the model has (E, I, O)
        self._files = WeightFiles(())  # the same tensors as they are stored
        self._files.entries = dict(self.entries)
        self._fp8: dict[str, _Blocks] = {}
        self._scales: tuple[str, Tensor] | None = None  # of the weight being read
        if self.method == "fp8":
            self._find_fp8(stored.get("weight_block_size"))
        else:
            self._find_mxfp4()
        if not self.decoded:
            raise BadFile(f"config.json says that the weights are {self.method}, but no tensor of the files is")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As of plain files; fp32 of a decoded weight."""
        if name not in self.decoded:
            return super().read(name, start, stop)
        stop = self.entries[name].numel if stop is None else stop
        return (self._read_fp8 if name in self._fp8 else self._read_mxfp4)(name, start, stop)

    def _decodes(self, name: str, entry: Entry, shape: tuple[int, ...], *parts: str) -> None:
        for part in parts:
            del self.entries[part]
        self.entries[name] = replace(entry, dtype=torch.float32, shape=shape)
        self.decoded.add(name)

    # --- fp8 ----------------------------------------------------------------------------------------------------------

    def _find_fp8(self, block: Any) -> None:
        stored = self._files.entries
        for name, entry in stored.items():
            stem = next((name.removesuffix(end) for end in (SCALE, *_OTHER_SCALES) if name.endswith(end)), None)
            if name.endswith(SCALE) and stem not in stored:
                raise BadFile(f"{entry.path}: {name} belongs to no weight; the download is incomplete")
            if not name.endswith(SCALE) and f"{stem}.weight" in stored:
                raise BadFile(f"{entry.path}: {name} scales a weight under a name that is not read; expected {SCALE}")
            scale = stored.get(f"{name}{SCALE}")
            if scale is not None:
                self._fp8[name] = _blocks_of(name, entry, scale, block)
                self._decodes(name, entry, entry.shape, f"{name}{SCALE}")
            elif entry.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                raise BadFile(f"{entry.path}: {name} is {entry.dtype} without {name}{SCALE}; expected its scales")

    def _read_fp8(self, name: str, start: int, stop: int) -> Tensor:
        blocks, (height, width) = self._fp8[name], self.entries[name].shape[-2:]
        if self._scales is None or self._scales[0] != name:
            scales = self._files.read(f"{name}{SCALE}")
            # one byte is an exponent, whether or not the file's type says so
            scales = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
            self._scales = name, scales.view(-1, blocks.across)
        row = torch.arange(start // width, -(-stop // width))  # the rows in which the piece lies
        cells = row // height * blocks.down + row % height // blocks.rows
        scales = self._scales[1][cells].repeat_interleave(blocks.columns, dim=1)[:, :width].reshape(-1)
        first = start // width * width
        return self._files.read(name, start, stop).float().mul_(scales[start - first : stop - first])

    # --- mxfp4 --------------------------------------------------------------------------------------------------------

    def _find_mxfp4(self) -> None:
        stored = self._files.entries
        for name in dict.fromkeys(key.removesuffix(end) for key in stored for end in (BLOCKS, SCALES)
                                  if key.endswith(end)):  # fmt: skip
            blocks, scales = stored.get(name + BLOCKS), stored.get(name + SCALES)
            if blocks is None or scales is None:
                raise BadFile(f"{name} has only one of {BLOCKS} and {SCALES}; the download is incomplete")
            are_bytes = blocks.dtype == scales.dtype == torch.uint8
            if not are_bytes or blocks.shape != (*scales.shape, GROUP // 2) or len(scales.shape) != 3:
                raise BadFile(
                    f"{blocks.path}: {name} has {BLOCKS} {blocks.shape} and {SCALES} {scales.shape}; expected bytes "
                    "(E, O, I / 32, 16) and bytes (E, O, I / 32)"
                )
            num_experts, outputs, groups = scales.shape
            self._decodes(name, blocks, (num_experts, outputs, groups * GROUP), name + BLOCKS, name + SCALES)
            self.transposed.add(name)

    def _read_mxfp4(self, name: str, start: int, stop: int) -> Tensor:
        first, last = start // GROUP, -(-stop // GROUP)
        codes = self._files.read(name + BLOCKS, first * GROUP // 2, last * GROUP // 2)
        exponents = self._files.read(name + SCALES, first, last).int() - 127
        values = torch.ldexp(_E2M1_PAIRS[codes.int()].view(-1, GROUP), exponents[:, None])
        return values.view(-1)[start - first * GROUP : stop - first * GROUP]


def _blocks_of(name: str, entry: Entry, scale: Entry, block: Any) -> _Blocks:
    """Raises BadFile unless a scale of this shape can only be meant in one way."""
    where = f"{entry.path}: {name}"
    if entry.dtype != torch.float8_e4m3fn:
        raise BadFile(f"{where} has scales but the type {entry.dtype}, which is not read; expected float8_e4m3fn")
    if scale.dtype not in _SCALE_TYPES:
        raise BadFile(f"{where} has scales of the type {scale.dtype}; expected floats, or exponents as bytes")
    block = block if isinstance(block, list | tuple) and len(block) == 2 else (None, None)
    if len(entry.shape) >= 2:
        grid = scale.shape if len(scale.shape) == len(entry.shape) else (*entry.shape[:-2], 1, 1)
        sizes = [_block(*one) for one in zip(entry.shape[-2:], grid[-2:], block, strict=True)]
        rows, columns = sizes
        if grid[:-2] == entry.shape[:-2] and rows and columns and scale.numel == prod(grid):
            return _Blocks(rows, columns, grid[-2], grid[-1])
    raise BadFile(
        f"{where} is {entry.shape} with scales {scale.shape}, which do not divide it into blocks of {block} "
        "(weight_block_size); expected one scale for each block, row, or weight"
    )


def _block(size: int, cells: int, given: Any) -> int | None:
    """Weights along one side of a block; None if that is not certain."""
    if type(given) is int and given > 0 and cells == -(-size // given):
        return given
    if cells in (1, size):
        return size // cells
    # of gate and up in one matrix, each smaller than a block, transformers keeps one scale each
    return size // 2 if cells == 2 and size % 2 == 0 and type(given) is int and size // 2 <= given else None
