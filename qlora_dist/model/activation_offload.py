"""Saved activations in host memory between forward and backward, copied while the device computes.

torch's own `save_on_cpu` copies in the compute stream, so that the device waits for the bus, and copies every saved
tensor, frozen weights among them. Here parameters stay where they are, a tensor that several operators save is copied
once, copies to the host run in a stream of their own and back ahead of their use in another, through pinned buffers
that are used again in every micro-step.

With recomputed layers only their inputs are saved outside of the recomputation, so only these move: hidden size x
tokens x bytes of the compute type for each layer. On a CPU the same code copies within host memory.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

MIN_BYTES = {"cuda": 2**20, "cpu": 1}  # smaller tensors cost more to handle than they hold
IN_FLIGHT = 2  # copies to the host that may keep their source alive
AHEAD_BYTES = 256 * 2**20  # copied back before they are asked for


class ActivationOffload(torch.autograd.graph.saved_tensors_hooks):
    """Context manager around a forward pass on one device; leave it before the backward pass.

    One instance serves a whole run. `host_bytes` is the (pinned) host memory that it holds.
    """

    def __init__(self, device: torch.device, min_bytes: int | None = None) -> None:
        super().__init__(self._pack, self._unpack)
        assert device.type == "cpu" or device.index is not None, (
            f"{device} equals no tensor's device: nothing would move"
        )
        self._device = device
        self._min_bytes = MIN_BYTES.get(device.type, 1) if min_bytes is None else min_bytes
        self._buffers = _Buffers(is_pinned=device.type == "cuda")
        self._leaving: deque[_Offloaded] = deque()  # copies to the host that may still run, oldest first
        self._saved: list[weakref.ref[_Offloaded]] = []  # of this forward pass, in its order
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
        self.num_offloaded = 0  # tensors copied so far
        self.num_kept = 0  # tensors left where they are

    @property
    def host_bytes(self) -> int:
        return self._buffers.num_bytes

    def __enter__(self) -> None:
        self._saved = []
        super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        while self._leaving:
            self._settle()

    # --- forward ------------------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        if not self._moves(tensor):
            self.num_kept += 1
            return tensor
        for pending in self._leaving:  # saved a moment ago by another operator
            if pending.holds(tensor):
                pending.num_uses += 1
                return pending
        self.num_offloaded += 1
        offloaded = _Offloaded(tensor, len(self._saved), self._buffers, self._buffers.take(tensor.nbytes))
        self._saved.append(weakref.ref(offloaded))
        if self._streams is None:
            offloaded.host.copy_(tensor)
        else:
            to_host = self._streams[0]
            to_host.wait_stream(torch.cuda.current_stream(self._device))
            if offloaded.buffer.last_use is not None:
                to_host.wait_event(offloaded.buffer.last_use)
            with torch.cuda.stream(to_host):
                offloaded.host.copy_(tensor, non_blocking=True)
            offloaded.copied = to_host.record_event()
        self._leaving.append(offloaded)
        while len(self._leaving) > IN_FLIGHT:
            self._settle()
        return offloaded

    def _moves(self, tensor: Tensor) -> bool:
        """Activations do. Weights (and views of them) live on the device anyway, and a stride of 0 holds no memory."""
        is_weight = isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
        return (
            tensor.device == self._device
            and not is_weight
            and tensor.nbytes >= self._min_bytes
            and tensor.nbytes <= tensor.untyped_storage().nbytes()
            and tensor.layout == torch.strided
        )

    def _settle(self) -> None:
        """Lets go of the oldest source. Its memory may be taken by what the compute stream does after its copy."""
        oldest = self._leaving.popleft()
        if oldest.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(oldest.copied)
        oldest.source = None

    # --- backward -----------------------------------------------------------------------------------------------------

    def _unpack(self, packed: Tensor | _Offloaded) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._bring_back(packed)
        tensor = packed.returned
        assert tensor is not None
        packed.wait_until_back()
        packed.num_uses -= 1
        if packed.num_uses <= 0:
            packed.returned = None
        self._bring_back_ahead(packed.index)
        return tensor

    def _bring_back_ahead(self, index: int) -> None:
        """The backward pass asks in the reverse order of the forward pass."""
        if self._streams is None:
            return
        ahead = 0
        for place in range(min(index, len(self._saved)) - 1, -1, -1):
            earlier = self._saved[place]()
            if earlier is not None and earlier.num_uses > 0:
                ahead += earlier.host.nbytes
                if ahead > AHEAD_BYTES and earlier.host.nbytes != ahead:
                    return
                self._bring_back(earlier)

    def _bring_back(self, offloaded: _Offloaded) -> None:
        if offloaded.returned is not None:
            return
        # made in the compute stream, which frees it too: the copy only has to start after it and end before its use
        offloaded.returned = torch.empty_like(offloaded.host, device=self._device, pin_memory=False)
        if self._streams is None:
            offloaded.returned.copy_(offloaded.host)
            return
        to_device = self._streams[1]
        to_device.wait_stream(torch.cuda.current_stream(self._device))
        assert offloaded.copied is not None
        to_device.wait_event(offloaded.copied)
        with torch.cuda.stream(to_device):
            offloaded.returned.copy_(offloaded.host, non_blocking=True)
        offloaded.arrived = offloaded.buffer.last_use = to_device.record_event()


class _Offloaded:
    """One saved tensor in host memory. Its buffer goes back when autograd lets go of it."""

    def __init__(self, tensor: Tensor, index: int, buffers: _Buffers, buffer: _Buffer) -> None:
        self.source: Tensor | None = tensor
        self.index = index
        self.num_uses = 1  # operators that saved it and have not asked for it yet
        self.buffer = buffer
        self.copied: torch.cuda.Event | None = None
        self.returned: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self._buffers = buffers
        self._version = tensor._version
        flat = self.buffer.memory[: tensor.nbytes].view(tensor.dtype)
        # the same strides, where the tensor is dense: another layout could choose another kernel in the backward pass
        stride = torch.empty_like(tensor, device="meta").stride()
        self.host = flat.as_strided(tensor.shape, stride)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is the same, unchanged tensor."""
        source = self.source
        return (
            source is not None
            and source.data_ptr() == tensor.data_ptr()
            and source.dtype == tensor.dtype
            and source.shape == tensor.shape
            and source.stride() == tensor.stride()
            and self._version == tensor._version
        )

    def wait_until_back(self) -> None:
        """The compute stream waits for the copy to the device."""
        if self.arrived is not None and self.returned is not None:
            torch.cuda.current_stream(self.returned.device).wait_event(self.arrived)

    def __del__(self) -> None:
        self.wait_until_back()  # brought back and never asked for: the compute stream frees it
        self._buffers.give_back(self.buffer)


class _Buffer:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # (bytes,) uint8
        self.last_use: torch.cuda.Event | None = None  # the copy that last read it


class _Buffers:
    """Host buffers that are taken and given back; a new one is made only where no free one is large enough."""

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._free: list[_Buffer] = []
        self.num_bytes = 0

    def take(self, num_bytes: int) -> _Buffer:
        sizes = {buffer.memory.nbytes: buffer for buffer in self._free}
        fitting = [size for size in sizes if num_bytes <= size <= 2 * num_bytes]
        if fitting:
            self._free.remove(best := sizes[min(fitting)])
            return best
        smaller = [size for size in sizes if size < num_bytes]
        if smaller:  # rows get longer: the largest of those that are too small makes room
            self._free.remove(sizes[max(smaller)])
            self.num_bytes -= max(smaller)
        self.num_bytes += num_bytes
        return _Buffer(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned))

    def give_back(self, buffer: _Buffer) -> None:
        self._free.append(buffer)
