"""Live bytes by category, tracked at every operation on real or fake tensors."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config.quantization import BLOCK, Quantization
from ..model import quantized_and_back

Workspace = Callable[[tuple[Any, ...], dict[str, Any], Any], int]


class LiveBytes(TorchDispatchMode):
    """Tracks the storages of all tensors that operations create within it, and records the peak.

    `workspaces` maps an operation's name to the bytes that its GPU kernel allocates outside tensors.
    """

    def __init__(self, workspaces: dict[str, Workspace] | None = None) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.peak_bytes = 0
        self.peak_at = ""
        self.total = 0
        self.timeline: list[tuple[str, int]] | None = None  # (operation, bytes alive after it), if it is a list
        self._category = "temporaries"
        self.counted: set[int] = set()
        self._workspaces = workspaces or {}

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Storages created inside are counted under this name for as long as they live."""
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    def count(self, tensor: torch.Tensor, category: str | None = None) -> None:
        """Counts a tensor's storage from now on, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.counted or size == 0:
            return
        category = category or self._category
        self.counted.add(key)
        self.live[category] += size
        self.total += size
        weakref.finalize(storage, self._forget, key, category, size)

    def reset_peak(self) -> None:
        """Tracks the peak from now on."""
        self.peak, self.peak_bytes = Counter(), 0

    def _forget(self, key: int, category: str, size: int) -> None:
        self.counted.discard(key)
        self.live[category] -= size
        self.total -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        name = str(function).removesuffix(".default")
        workspace = self._workspaces[name](args, kwargs, result) if name in self._workspaces else 0
        if self.timeline is not None:
            self.timeline.append((name, self.total + workspace))
        if self.total + workspace > self.peak_bytes:
            self.peak_bytes = self.total + workspace
            self.peak = Counter({key: size for key, size in self.live.items() if size})
            if workspace:
                self.peak["kernel workspace"] = workspace
            self.peak_at = f"{self._category}: {name}"
        return result


def create_tables(quantization: Quantization) -> None:
    """bitsandbytes creates its tables of values at first use, which must not be under fake tensors."""
    if quantization != "none":
        quantized_and_back(torch.ones(BLOCK, BLOCK), quantization, True, torch.float32)


def gpu_workspaces() -> dict[str, Workspace]:
    """Bytes that a kernel allocates internally and frees before it returns."""

    def of_logsumexp(args: Any, kwargs: Any, result: Any) -> int:
        return int(args[0].nbytes)  # exp(x - max)

    def of_product(args: Any, kwargs: Any, result: Any) -> int:
        a, shape = args[0], args[2]
        weights = math.prod(shape)
        nested = kwargs.get("absmax_8bit", args[7] if len(args) > 7 else None) is not None
        # the matrix, and its constants if they are quantized themselves
        return int(weights * a.element_size() + (4 * -(-weights // BLOCK) if nested else 0))

    def of_attention_backward(args: Any, kwargs: Any, result: Any) -> int:
        q, k = args[1], args[2]
        summed = 4 * q.numel() + 4 * q.shape[0] * q.shape[1]  # gradient of the queries in fp32; rows of out * grad
        grouped = 2 * q.nbytes if k.shape[1] != q.shape[1] else 0  # of keys and values, for every query head
        return int(summed + grouped)

    return {
        "aten.logsumexp": of_logsumexp,
        "bitsandbytes.gemm_4bit": of_product,
        "torch_attn._varlen_attn_backward": of_attention_backward,
    }
