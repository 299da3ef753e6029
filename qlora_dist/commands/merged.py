"""A base with an adapter merged, one weight after another: what `merge` writes, and what it measures.

Legend: E experts, O outputs, I inputs of a layer, r rank.
"""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError
from ..files import format_bytes
from ..model import is_conv1d, linear_layers, lora_files, quantized_and_back, stacked_experts, text_part
from ..model.experts import EXPERT_WEIGHTS
from ..model.one_by_one import OpenBase, is_finite
from ..model.precision import float32_names
from ..model.text_part import TextPart
from ..model.weights.wrapper_files import write_wrapper
from ..model.weights.write_model import write_model
from .trained import Trained

Target = Literal["base", "dequantized"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Adapter:
    """A LoRA or DoRA adapter as plain tensors."""

    layers: dict[str, lora_files.Factors]  # by the name in the base of a layer, or of stacked experts' weight
    scale: float
    rank: int

    @classmethod
    def read(cls, folder: Path, part: TextPart | None) -> Adapter:
        config, layers = lora_files.read_adapter(folder, part)
        return cls(layers, lora_files.scale_of(config), config.r)

    def check_fits(self, name: str, shape: Sequence[int], base: str) -> None:
        """`shape` in the base: (O, I), or (E, O, I) of stacked experts. Raises UserError."""
        if (factors := self.layers.get(name)) is None:
            return
        num_experts = math.prod(shape[:-2])  # 1 for a linear layer
        if factors.a.shape != (num_experts * self.rank, shape[-1]) or len(factors.b) != shape[-2]:
            raise UserError(f"the adapter's weights for {name} do not fit {base}, where it is {tuple(shape)}")

    def on(self, name: str, weight: Tensor) -> Tensor:
        """(O, I) fp32: the layer's weight with the adapter merged."""
        factors, device = self.layers[name], weight.device
        changed = weight + self.scale * (factors.b.to(device) @ factors.a.to(device))
        if factors.magnitude is not None:
            changed *= (factors.magnitude.to(device) / changed.norm(dim=1))[:, None]
        return changed

    def on_expert(self, name: str, weight: Tensor, expert: int) -> Tensor:
        """(O, I) fp32: one expert's part of a stacked weight with its adapter merged, if it has one."""
        if (factors := self.layers.get(name)) is None:
            return weight
        a = factors.a.view(-1, self.rank, weight.shape[1])[expert].to(weight.device)
        b = factors.b.view(len(weight), self.rank, -1)[:, :, expert].to(weight.device)
        return weight + self.scale * (b @ a)


class Merged:
    """The base with an adapter merged, one weight after another: what is written, and what is measured.

    Each weight is computed on `device`, where it was trained: quantizing 7B takes a CPU core minutes. Onto dequantized,
    weights that were quantized but not adapted are replaced too: experts, most of all.
    """

    def __init__(
        self, base: OpenBase, settings: ModelConfig, adapter: Adapter, onto: Target, dtype: torch.dtype, device: Any
    ) -> None:
        self.base, self._settings, self._adapter, self._onto = base, settings, adapter, onto
        self._dtype, self._device = dtype, device
        self._layers: dict[str, Any] = linear_layers(base.model)
        self._kept = float32_names(base.model, dtype)
        self._stacks = {  # name -> whether it is stored (E, I, O)
            f"{name}.{weight}": bool(getattr(experts, "is_transposed", False))
            for name, experts in stacked_experts(base.model).items()
            for weight in EXPERT_WEIGHTS
        }
        unknown = sorted(adapter.layers.keys() - self._layers.keys() - self._stacks.keys())
        if unknown:
            raise UserError(
                f"the adapter has weights for {unknown[0]}, which is neither a linear layer nor experts of "
                f"{settings.name}; name the base that it was trained on with --base"
            )

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """A weight or buffer of the merged model, on the CPU, in its final type. Raises UserError if not finite."""
        stored, layer = self.base.weight(name), self._layers.get(name.removesuffix(".weight"))
        if not stored.is_floating_point():
            return stored
        if layer is not None and name.endswith(".weight"):
            merged = self._linear(name.removesuffix(".weight"), layer, stored)
        elif name in self._stacks:
            merged = self._stacked(name, stored)
        else:
            merged = stored.to(torch.float32 if name in self._kept else self._dtype)
        if not is_finite(merged, is_buffer=name not in self.base.parameters):
            raise UserError(
                f"{name} is not finite when it is merged in {self._dtype}, though base and adapter are: its values are "
                "too large. Use --dtype bfloat16 or float32; if it fails there too, the adapter has diverged. Nothing "
                "was written"
            )
        return merged

    def _linear(self, name: str, layer: Any, stored: Tensor) -> Tensor:
        adapter, dtype, onto = self._adapter, self._dtype, self._onto
        factors = adapter.layers.get(name)
        if factors is None and onto == "base":
            return stored.to(dtype)
        weight = stored.T if is_conv1d(layer) else stored
        adapter.check_fits(name, weight.shape, self._settings.name)
        weight = weight.to(self._device)
        original = _dequantized(weight, self._settings) if onto == "dequantized" else weight.float()
        changed = (original if factors is None else adapter.on(name, original)).to(CPU, dtype)
        return changed.T.contiguous() if is_conv1d(layer) else changed

    def _stacked(self, name: str, stored: Tensor) -> Tensor:
        """Of all experts of a layer."""
        is_dequantized = self._onto == "dequantized" and self._settings.quantization in ("nf4", "fp4")
        if not is_dequantized and name not in self._adapter.layers:
            return stored.to(self._dtype)
        is_transposed = self._stacks[name]
        if is_transposed and name in self._adapter.layers:
            raise UserError(
                f"the adapter has weights for {name}, whose matrices are stored (inputs, outputs), which is not "
                "supported; use PEFT's merge"
            )
        self._adapter.check_fits(name, stored.shape, self._settings.name)
        merged = torch.empty(stored.shape, dtype=self._dtype)
        for expert, matrix in enumerate(stored):
            weight = matrix.to(self._device)
            if is_transposed:
                weight = weight.T.contiguous()
            original = _dequantized(weight, self._settings) if is_dequantized else weight.float()
            changed = self._adapter.on_expert(name, original, expert)
            merged[expert].copy_(changed.T if is_transposed else changed)
        return merged

    def write(self, folder: Path, trained: Trained, max_shard_size: str, text_only: bool) -> None:
        """Writes the model. Raises OSError when there is no space."""
        model, dtype = self.base.model, self._dtype
        part = None if text_only else text_part(model)
        needed = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
        needed += 0 if part is None else 4 * part.num_left_out  # kept as stored: fp32 at most
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"{format_bytes(free)} are free, {format_bytes(needed)} are needed", str(folder)
            )
        if part is None:
            write_model(model, self.weight, folder, dtype, max_shard_size)
        else:
            write_wrapper(model, self.weight, trained.model.name, trained.model.revision, folder, dtype)


def _dequantized(weight: Tensor, settings: ModelConfig) -> Tensor:
    """(O, I) fp32: what was trained with."""
    compute_dtype = getattr(torch, settings.compute_dtype)
    return quantized_and_back(weight, settings.quantization, settings.double_quant, compute_dtype)


# --- measuring --------------------------------------------------------------------------------------------------------
