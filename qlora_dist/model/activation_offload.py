"""Keeps saved activations in host memory between forward and backward, copying while the device computes.

torch's `save_on_cpu` copies in the compute stream, so the device waits for the bus, and copies every saved tensor,
including frozen weights. Here parameters stay in place, a tensor saved by several operators is copied once, copies to
the host run in one side stream and prefetches in another, through pinned buffers reused in every micro-step.

With recomputed layers only their inputs are saved outside the recomputation, so only these move: hidden size x
tokens x bytes of the compute type per layer. On a CPU the same code copies within host memory.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

MIN_BYTES = {"cuda": 2**20, "cpu": 1}  # smaller tensors are not worth the overhead
IN_FLIGHT = 2  # copies to the host that may keep their source alive
AHEAD_BYTES = 256 * 2**20  # prefetched before they are needed


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
        self._buffers = _BufferPool(is_pinned=device.type == "cuda")
        self._in_flight: deque[_Offloaded] = deque()  # copies to the host that may still run, oldest first
        self._saved: list[weakref.ref[_Offloaded]] = []  # of this forward pass, in order
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
        self.num_offloaded = 0  # tensors copied so far
        self.num_kept = 0  # tensors left in place

    @property
    def host_bytes(self) -> int:
        return self._buffers.num_bytes

    def __enter__(self) -> None:
        self._saved = []
        super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        while self._in_flight:
            self._release_oldest()

    # --- forward ------------------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        if not self._should_move(tensor):
            self.num_kept += 1
            return tensor
        for pending in self._in_flight:  # saved a moment ago by another operator
            if pending.is_same(tensor):
                pending.num_uses += 1
                return pending
        self.num_offloaded += 1
        offloaded = _Offloaded(tensor, len(self._saved), self._buffers, self._buffers.acquire(tensor.nbytes))
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
        self._in_flight.append(offloaded)
        while len(self._in_flight) > IN_FLIGHT:
            self._release_oldest()
        return offloaded

    def _should_move(self, tensor: Tensor) -> bool:
        """Activations do. Weights (and views of them) stay on the device anyway, and a stride of 0 takes no memory."""
        is_weight = isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
        return (
            tensor.device == self._device
            and not is_weight
            and tensor.nbytes >= self._min_bytes
            and tensor.nbytes <= tensor.untyped_storage().nbytes()
            and tensor.layout == torch.strided
        )

    def _release_oldest(self) -> None:
        """Releases the oldest source. The compute stream may reuse its memory after the copy."""
        oldest = self._in_flight.popleft()
        if oldest.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(oldest.copied)
        oldest.source = None

    # --- backward -----------------------------------------------------------------------------------------------------

    def _unpack(self, packed: Tensor | _Offloaded) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._copy_back(packed)
        tensor = packed.returned
        assert tensor is not None
        packed.wait_for_copy()
        packed.num_uses -= 1
        if packed.num_uses <= 0:
            packed.returned = None
        self._prefetch(packed.index)
        return tensor

    def _prefetch(self, index: int) -> None:
        """The backward pass needs tensors in the reverse order of the forward pass."""
        if self._streams is None:
            return
        ahead = 0
        for place in range(min(index, len(self._saved)) - 1, -1, -1):
            earlier = self._saved[place]()
            if earlier is not None and earlier.num_uses > 0:
                ahead += earlier.host.nbytes
                if ahead > AHEAD_BYTES and earlier.host.nbytes != ahead:
                    return
                self._copy_back(earlier)

    def _copy_back(self, offloaded: _Offloaded) -> None:
        if offloaded.returned is not None:
            return
        # allocated in the compute stream, which also frees it: the copy must start after that and end before its use
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
    """One saved tensor in host memory. Its buffer is released when autograd frees it."""

    def __init__(self, tensor: Tensor, index: int, buffers: _BufferPool, buffer: _Buffer) -> None:
        self.source: Tensor | None = tensor
        self.index = index
        self.num_uses = 1  # operators that saved it and have not unpacked it yet
        self.buffer = buffer
        self.copied: torch.cuda.Event | None = None
        self.returned: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self._buffers = buffers
        self._version = tensor._version
        flat = self.buffer.memory[: tensor.nbytes].view(tensor.dtype)
        # the same strides if the tensor is dense: another layout could select another kernel in the backward pass
        stride = torch.empty_like(tensor, device="meta").stride()
        self.host = flat.as_strided(tensor.shape, stride)

    def is_same(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the saved one, unchanged."""
        source = self.source
        return (
            source is not None
            and source.data_ptr() == tensor.data_ptr()
            and source.dtype == tensor.dtype
            and source.shape == tensor.shape
            and source.stride() == tensor.stride()
            and self._version == tensor._version
        )

    def wait_for_copy(self) -> None:
        """The compute stream waits for the copy to the device."""
        if self.arrived is not None and self.returned is not None:
            torch.cuda.current_stream(self.returned.device).wait_event(self.arrived)

    def __del__(self) -> None:
        self.wait_for_copy()  # prefetched but never used: the compute stream frees it
        self._buffers.release(self.buffer)


class _Buffer:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # (bytes,) uint8
        self.last_use: torch.cuda.Event | None = None  # the copy that last read it


class _BufferPool:
    """Reusable host buffers; a new one is allocated only if no free one is large enough."""

    def __init__(self, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._free: list[_Buffer] = []
        self.num_bytes = 0

    def acquire(self, num_bytes: int) -> _Buffer:
        sizes = {buffer.memory.nbytes: buffer for buffer in self._free}
        fitting = [size for size in sizes if num_bytes <= size <= 2 * num_bytes]
        if fitting:
            self._free.remove(best := sizes[min(fitting)])
            return best
        smaller = [size for size in sizes if size < num_bytes]
        if smaller:  # rows got longer: the largest of the too small ones is dropped
            self._free.remove(sizes[max(smaller)])
            self.num_bytes -= max(smaller)
        self.num_bytes += num_bytes
        return _Buffer(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned))

    def release(self, buffer: _Buffer) -> None:
        self._free.append(buffer)
