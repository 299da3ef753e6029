"""Linear layers that share their input as one product, adapters included.

LoRA's update is a product too, so its columns are appended to the contraction instead of being added to the result:

    forward     low = X A^T                          (T, R)
                Y   = [X | low] [W | s B]^T          (T, N)
    backward    G'  = G s B                          (T, R)
                dX  = [G | G'] [W ; A]               (T, K)
                dA  = G'^T X, dB = s G^T low

W are the matrices of all layers one below the other, A their adapters' rows, s B their B in the blocks of a diagonal.
Nothing is added to a result that was already rounded to 16 bits: an update of 1e-4 of the weight keeps its size, of
which an `addmm` into a bf16 result loses most. And the base's matrix is written once, beside its adapters.

Legend: T tokens, K inputs, N outputs of all layers together, R columns of all adapters, rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.joint_products import LARGEST_LOWERED, padded_columns, split_product
from .bitsandbytes_import import bitsandbytes
from .kernels import dequantize_4bit, norm_lower, rms_norm, write_a, write_b
from .kernels.registry import wide


class SharedInput:
    """Layers with the same input, in the order of their outputs.

    `layers` are PEFT's LoRA layers with one active adapter, of the same scale in all of them, or plain ones.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = tuple(layers)
        self.bases: tuple[Any, ...] = tuple(getattr(layer, "base_layer", layer) for layer in layers)
        self.inputs: int = self.bases[0].in_features
        widths = [base.out_features for base in self.bases]
        self.first_rows = [sum(widths[:index]) for index in range(len(widths))]
        self.outputs = sum(widths)
        self.adapters: list[tuple[Tensor, Tensor]] = []  # (A, B) of each adapted layer
        self.adapter_rows: list[int] = []  # the first row of its layer's outputs
        self.scale = 1.0
        for layer, first in zip(self.layers, self.first_rows, strict=True):
            (name,) = getattr(layer, "active_adapters", (None,))
            if name in getattr(layer, "lora_A", ()):  # an adapter need not have every layer that another has
                self.adapters.append((layer.lora_A[name].weight, layer.lora_B[name].weight))
                self.adapter_rows.append(first)
                self.scale = layer.scaling[name]
        self.columns = padded_columns([len(a) for a, _ in self.adapters])
        self.parts = split_product(widths, self.inputs)

    @property
    def rank(self) -> int | None:
        """That of all layers; None if they differ or one has no adapter."""
        ranks = {len(a) for a, _ in self.adapters}
        return ranks.pop() if len(ranks) == 1 and len(self.adapters) == len(self.layers) else None

    @property
    def parameters(self) -> list[Tensor]:
        """All A, then all B."""
        return [a for a, _ in self.adapters] + [b for _, b in self.adapters]

    def input_buffer(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """[X | low], (T, K + R), in the type of `like`; and its view X, to be filled."""
        buffer = like.new_empty(like.shape[0], self.inputs + self.columns)
        return buffer, buffer[:, : self.inputs]

    def gradient_buffer(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """[G | G'], (T, N + R); and its view G, to be filled."""
        buffer = like.new_empty(like.shape[0], self.outputs + self.columns)
        return buffer, buffer[:, : self.outputs]

    def filled_input(
        self, like: Tensor, source: Tensor, fill: Callable[[Tensor, Tensor], Any], fill_and_lower: Callable[..., None]
    ) -> tuple[Tensor, Tensor | None]:
        """[X | low] and low, where `fill` makes X from `source`; both in one pass over X if there are few columns."""
        joined, first = self.input_buffer(like)
        if not self.adapters or self.columns > LARGEST_LOWERED or not computes_jointly(like):
            fill(source, first)
            return joined, self.lower(joined)
        low = joined.new_empty(len(joined), self.columns)
        fill_and_lower(source, self._stacked_a(joined), low, joined)
        return joined, low

    def normed_input(self, x: Tensor, weight: Tensor, eps: float, scales: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same of the norm of x, which leaves what it multiplied each row by in `scales`."""
        return self.filled_input(
            x,
            x,
            lambda source, out: rms_norm(source, weight, eps, scales, out),
            lambda source, rows, low, joined: norm_lower(source, weight, eps, rows, scales, low, joined),
        )

    def _stacked_a(self, like: Tensor) -> Tensor:
        """(R, K), in the type of `like`."""
        rows = like.new_empty(self.columns, self.inputs)
        write_a([a.detach() for a, _ in self.adapters], rows)
        return rows

    def lower(self, joined: Tensor) -> Tensor | None:
        """Fills the second part of [X | low]; returns low (T, R), which the backward pass needs. None: no adapters."""
        if not self.adapters:
            return None
        low = torch.mm(joined[:, : self.inputs], self._stacked_a(joined).t())
        joined[:, self.inputs :].copy_(low)
        return low

    def product(
        self, joined: Tensor, out: Tensor | None = None, residual: Tensor | None = None, factor: float = 1.0
    ) -> Tensor:
        """Y (T, N) from [X | low]; with `residual` (T, N), residual + factor * Y, rounded once."""
        if out is None:
            out = joined.new_empty(joined.shape[0], self.outputs)
        for start, stop in self.parts:
            first, last = self._rows(start, stop)
            matrix = joined.new_empty(last - first, self.inputs + self.columns)
            self._write_bases(start, stop, matrix[:, : self.inputs])
            if self.adapters:
                self._write_b(first, last, matrix[:, self.inputs :])
            target = out[:, first:last]
            if residual is not None:
                torch.addmm(residual[:, first:last], joined, matrix.t(), alpha=factor, out=target)
            elif (bias := self._bias(start, stop, joined.dtype)) is not None:
                torch.addmm(bias, joined, matrix.t(), out=target)
            else:
                torch.mm(joined, matrix.t(), out=target)
            del matrix  # before the next one
        return out

    def stacked_b(self, like: Tensor) -> Tensor:
        """All B one below the other (N, r), for layers of one `rank`, in the type of `like`; not scaled."""
        assert self.rank is not None
        rows = like.new_empty(self.outputs, self.rank)
        write_a([b.detach() for _, b in self.adapters], rows)
        return rows

    def raise_gradient(self, joined: Tensor) -> None:
        """Fills the second part of [G | G']."""
        if self.adapters:
            matrix = joined.new_empty(self.outputs, self.columns)
            self._write_b(0, self.outputs, matrix)
            torch.mm(joined[:, : self.outputs], matrix, out=joined[:, self.outputs :])

    def grad_input(self, joined: Tensor, out: Tensor | None = None) -> Tensor:
        """dX (T, K) from [G | G']."""
        result: Tensor | None = None
        if out is None:
            out = joined.new_empty(len(joined), self.inputs)
        for start, stop in self.parts:
            first, last = self._rows(start, stop)
            is_last = stop == len(self.layers)
            matrix = joined.new_empty(last - first + (self.columns if is_last else 0), self.inputs)
            self._write_bases(start, stop, matrix)
            if is_last and self.adapters:
                write_a([a.detach() for a, _ in self.adapters], matrix[last - first :])
            own = joined[:, first : first + len(matrix)]
            result = torch.mm(own, matrix, out=out) if result is None else result.addmm_(own, matrix)
            del matrix
        assert result is not None
        return result

    def grad_a(self, raised: Tensor, x: Tensor, weight: Tensor | None = None) -> list[Tensor | None]:
        """Of all A, from G' (T, R) and X (T, K).

        The norm of rows times `weight` (K,) need not be computed again: G'^T norm(X) is (scales * G')^T X * weight.
        """
        by_input = wide_mm(raised.t(), x)  # (R, K)
        if weight is not None:
            by_input.mul_(weight)
        found: list[Tensor | None] = []
        row = 0
        for a, _ in self.adapters:
            found.append(by_input[row : row + len(a)].to(a.dtype))
            row += len(a)
        return found

    def grad_b(self, grad: Tensor, low: Tensor) -> list[Tensor | None]:
        """Of all B, from G (T, N) and low (T, R)."""
        by_output = wide_mm(grad.t(), low).mul_(self.scale)  # (N, R)
        found: list[Tensor | None] = []
        column = 0
        for (_, b), first in zip(self.adapters, self.adapter_rows, strict=True):
            found.append(by_output[first : first + len(b), column : column + b.shape[1]].to(b.dtype))
            column += b.shape[1]
        return found

    # --- the matrices -------------------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int) -> tuple[int, int]:
        """Of the outputs of layers start to stop."""
        return self.first_rows[start], self.outputs if stop == len(self.layers) else self.first_rows[stop]

    def _write_bases(self, start: int, stop: int, out: Tensor) -> None:
        row = 0
        for base in self.bases[start:stop]:
            write_weight(base, out[row : row + base.out_features])
            row += base.out_features

    def _write_b(self, first: int, last: int, out: Tensor) -> None:
        """s B of the rows first to last of all outputs, in the columns of all adapters."""
        own = [index for index, row in enumerate(self.adapter_rows) if first <= row < last]
        before = sum(len(a) for a, _ in self.adapters[: own[0]]) if own else self.columns
        if before:
            out[:, :before].zero_()
        if own:
            rows = [self.adapter_rows[index] - first for index in own]
            write_b([self.adapters[index][1].detach() for index in own], rows, self.scale, out[:, before:])

    def _bias(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """(N of these layers,), or None if none of them has one."""
        bases = self.bases[start:stop]
        if all(base.bias is None for base in bases):
            return None
        parts = [
            base.weight.new_zeros(base.out_features, dtype=dtype) if base.bias is None else base.bias.to(dtype)
            for base in bases
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def wide_mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, fp64 for fp64; summed and not rounded in between where the device can.

    Fake tensors stand for those of a GPU: simulation and prediction see its operations.
    """
    if (left.is_cuda or is_fake(left)) and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return wide(torch.mm(left, right))


def write_weight(base: Any, out: Tensor) -> None:
    """The matrix (N, K) of a frozen layer into rows of a wider buffer, dequantized if it is in 4 bits."""
    weight = base.weight
    if not isinstance(base, bitsandbytes.nn.Linear4bit):
        out.copy_(weight)
        return
    # a sharded layer's weight is whole while its decoder layer computes
    state = base.gathered_state() if hasattr(base, "gathered_state") else weight.quant_state
    if out.device.type == "cpu" and not is_fake(out):  # bitsandbytes' own kernel is vectorized
        out.copy_(bitsandbytes.functional.dequantize_4bit(weight.data.view(-1, 1), state))
        return
    nested = state.state2
    dequantize_4bit(
        weight.data,
        state.code,
        state.absmax,
        None if nested is None else nested.absmax,
        None if nested is None else nested.code,
        None if nested is None else state.offset,
        out,
    )


def computes_jointly(tensor: Tensor) -> bool:
    """Whether kernels with products inside take this type: of 16 bits, and any on a CPU, where references run."""
    return tensor.element_size() == 2 or (tensor.device.type == "cpu" and not is_fake(tensor))


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor)
