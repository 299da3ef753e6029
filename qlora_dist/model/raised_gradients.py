"""What adapters need of the gradient of their layers' results: G' = s G B and dB = s G^T low, in one pass over G.

And where G comes from: the layer above writes the gradient of its input into rows that have room for G', so that
nothing is copied to make [G | G'].

Legend: T tokens, N outputs, R columns of all adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..config.joint_products import LARGEST_JOINT_RANK, TOKENS_OF_CALL, num_raised
from .kernels import raised_products, sum_parts
from .products import SharedInput, computes_jointly, is_fake

_newest: StorageWeakRef | None = None  # of the gradients that `with_room` made


def with_room(like: Tensor, columns: int) -> Tensor:
    """An empty tensor of that shape (T, N), whose rows have room for `columns` more."""
    global _newest
    buffer = like.new_empty(like.shape[0], like.shape[1] + columns)
    _newest = StorageWeakRef(buffer.untyped_storage())
    return buffer[:, : like.shape[1]]


def widened(grad: Tensor, columns: int) -> Tensor | None:
    """[G | G'] (T, N + R) in the memory of a gradient that `with_room` made, whoever passed it on; else None.

    Only that of the newest one: what lies behind the rows of any other tensor may be in use.
    """
    if _newest is None or _newest.expired() or grad.untyped_storage()._cdata != _newest.cdata:
        return None
    width = grad.shape[1] + columns
    if grad.stride() != (width, 1) or grad.storage_offset() != 0:
        return None
    return grad.as_strided((grad.shape[0], width), (width, 1))


def raise_with_grad_b(
    layers: SharedInput, joined: Tensor, low: Tensor | None, scales: Tensor | None = None
) -> tuple[list[Tensor | None], Tensor]:
    """Fills the second part of [G | G'] (T, N + R); returns dB of all adapters, and G' (T, R).

    With `scales` (T,), the rows of the G' that is returned are multiplied with them. `low` is None without adapters.
    """
    if low is None:
        return [], joined[:, layers.outputs :]
    if layers.rank is None or layers.rank > LARGEST_JOINT_RANK or not computes_jointly(joined):
        layers.raise_gradient(joined)
        raised = joined[:, layers.outputs :]
        if scales is not None:
            raised = torch.mul(raised, scales[:, None], out=raised.new_empty(raised.shape))
        return layers.grad_b(joined[:, : layers.outputs], low), raised
    return _in_one_pass(layers, joined, low, scales)


def _in_one_pass(
    layers: SharedInput, joined: Tensor, low: Tensor, scales: Tensor | None
) -> tuple[list[Tensor | None], Tensor]:
    rank, outputs = layers.rank, [base.out_features for base in layers.bases]
    assert rank is not None
    grad, raised = joined[:, : layers.outputs], joined[:, layers.outputs :]
    ends = [first + width for first, width in zip(layers.first_rows, outputs, strict=True)]
    b = layers.stacked_b(joined)
    kind = torch.float64 if joined.dtype == torch.float64 else torch.float32
    is_plain = joined.device.type == "cpu" and not is_fake(joined)  # the reference needs no parts
    step = len(grad) if is_plain else TOKENS_OF_CALL
    scaled = None if scales is None else raised.new_empty(raised.shape)
    total: Tensor | None = None
    for start in range(0, len(grad), step):
        own = slice(start, start + step)
        tokens = len(grad[own])
        columns, rows = (len(outputs), 1) if is_plain else num_raised(tokens, outputs)
        of_rows = grad.new_empty(columns, tokens, rank, dtype=kind)
        of_columns = grad.new_empty(rows, layers.outputs, rank, dtype=kind)
        raised_products(grad[own], low[own], b, ends, layers.scale, of_rows, of_columns)
        parts = list(range(1, columns + 1)) if columns == len(outputs) else _part_ends(outputs)
        of_call = None if scales is None else scales[own]
        sum_parts(of_rows, parts, of_call, None if scaled is None else scaled[own], raised[own])
        del of_rows
        summed = of_columns[0] if rows == 1 else of_columns.sum(0)
        del of_columns
        total = summed if total is None else total.add_(summed)
    assert total is not None
    of_b: list[Tensor | None] = []
    for (_, weight), first in zip(layers.adapters, layers.adapter_rows, strict=True):
        of_b.append(total[first : first + len(weight)].to(weight.dtype))
    return of_b, raised if scaled is None else scaled


def _part_ends(outputs: list[int]) -> list[int]:
    """Where the parts of each layer end."""
    return [num_raised(1, outputs[: index + 1])[0] for index in range(len(outputs))]
