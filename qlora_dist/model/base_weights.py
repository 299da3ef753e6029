"""The tensors of the frozen base: what they are, how many bytes this rank holds, whether any has changed.

Everything here inspects this rank's tensors only; of a sharded base, its part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .bitsandbytes_import import bitsandbytes
from .forward import plain_name, unwrap

COLUMNS = 128  # 64-bit words of a row of the checksum
PIECE = 2**14  # rows summed at a time: 16 MiB of temporary memory


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the base, without adapters: plain weights, packed codes, quantization constants."""
    base = unwrap(model)
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        if "lora_" in name:
            continue
        yield plain_name(name), tensor
        state = getattr(tensor, "quant_state", None)
        for key, constant in (state.as_dict(packed=True) if state is not None else {}).items():
            yield f"{plain_name(name)}.{key}", constant
    for name, module in base.named_modules():
        if (scales := _int8_scales(module)) is not None:
            yield plain_name(f"{name}.SCB"), scales


def _int8_scales(module: Any) -> Tensor | None:
    if not isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return None
    scales: Tensor | None = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return scales


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor sharded by FSDP2 or ZeRO-3; any other tensor unchanged."""
    partition: Tensor | None = getattr(tensor, "ds_tensor", None)
    if partition is not None:
        return partition.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits: NaN equals itself, 0.0 is not -0.0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    first, second = (one.detach().contiguous().reshape(-1).view(torch.uint8) for one in (left, right))
    return torch.equal(first, second)


def num_weights(parameter: Tensor) -> int:
    """Weights that a parameter represents: a 4-bit weight counts as one, not as half a byte; its constants as none."""
    packed: int | None = getattr(parameter, "num_weights", None)
    if packed is not None:
        return packed
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


@torch.no_grad()
def non_finite_tensor(model: nn.Module) -> str | None:
    """The name of a tensor of this rank's base that has a NaN or an infinity; None: there is none.

    Of 4-bit weights the constants are inspected. A mask may hold -inf: of a buffer, only NaN and +inf count.
    """
    masks = {plain_name(name) for name, _ in unwrap(model).named_buffers()}
    largest: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in base_weights(model):
        part = own_part(tensor).detach()
        if part.is_floating_point() and part.numel():
            part = part.float() if part.dtype.itemsize < 2 else part
            # both pass a NaN on, and need no temporary memory
            value = part.max().clamp(min=0) if name in masks else torch.linalg.vector_norm(part, torch.inf)
            largest.setdefault(part.device, {})[name] = value.float()
    for values in largest.values():  # one copy to the host per device
        for name, number in zip(values, torch.stack(list(values.values())).tolist(), strict=True):
            if not math.isfinite(number):
                return name
    return None


def held_bytes(model: nn.Module) -> int:
    """Bytes of the storages that this rank's base keeps alive, without code tables (1 KiB per layer). Each counts once.

    Storages, not tensors: a small view of a large buffer keeps the whole buffer.
    """
    storages = {}
    for tensor in _held(unwrap(model)):
        storage = own_part(tensor).untyped_storage()
        storages[storage.data_ptr(), str(tensor.device)] = storage.nbytes()
    return sum(storages.values())


def _held(base: nn.Module) -> Iterator[Tensor]:
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            continue
        yield parameter
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            yield state.absmax
            if state.nested:
                yield state.state2.absmax
    for module in base.modules():
        nested = getattr(module, "nested_absmax", None)  # of a sharded 4-bit layer
        if nested is not None:
            yield nested
        if (scales := _int8_scales(module)) is not None:
            yield scales


@torch.no_grad()
def base_checksum(model: nn.Module) -> str:
    """A checksum of this rank's whole base: changing any one bit changes it, and nearly any swap of words does.

    Each tensor's bytes are read as 64-bit words in rows of 128; each row is multiplied by its own odd number, the rows
    are summed by column modulo 2**64 on the device, and only these sums are hashed. The cost is memory bandwidth.
    """
    digest = hashlib.sha256()
    sums: dict[torch.device, list[Tensor]] = {}
    for name, tensor in sorted(base_weights(model), key=lambda item: item[0]):
        if name.endswith("inv_freq"):
            continue  # computed from the config, and recomputed by models whose positions scale with the length
        part = own_part(tensor).detach()
        digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
        sums.setdefault(part.device, []).append(_column_sums(part))
    for columns in sums.values():  # one copy to the host per device
        digest.update(torch.cat(columns).cpu().numpy().tobytes())
    return digest.hexdigest()


def _column_sums(tensor: Tensor) -> Tensor:
    """(COLUMNS,) int64."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # words must be aligned
    width = 8 * COLUMNS
    whole = len(data) // width * width
    tail = torch.nn.functional.pad(data[whole:], (0, width - (len(data) - whole))).view(torch.int64)
    rows = data[:whole].view(torch.int64).view(-1, COLUMNS)
    total = tail * (2 * len(rows) + 1)
    for start in range(0, len(rows), PIECE):
        piece = rows[start : start + PIECE]
        # odd: changing any one bit of a word then changes its product modulo 2**64
        factors = torch.arange(start, start + len(piece), device=data.device) * 2 + 1
        total = total + (piece * factors[:, None]).sum(0)
    return total
