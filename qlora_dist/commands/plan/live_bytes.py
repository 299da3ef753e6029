"""Live bytes by category, tracked at every operation on real or fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        self._category = "temporaries"
        self._counted: set[int] = set()
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
        if key in self._counted or size == 0:
            return
        category = category or self._category
        self._counted.add(key)
        self.live[category] += size
        self.total += size
        weakref.finalize(storage, self._forget, key, category, size)

    def reset_peak(self) -> None:
        """Tracks the peak from now on."""
        self.peak, self.peak_bytes = Counter(), 0

    def _forget(self, key: int, category: str, size: int) -> None:
        self._counted.discard(key)
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
        if self.total + workspace > self.peak_bytes:
            self.peak_bytes = self.total + workspace
            self.peak = Counter({key: size for key, size in self.live.items() if size})
            if workspace:
                self.peak["kernel workspace"] = workspace
            self.peak_at = f"{self._category}: {name}"
        return result
