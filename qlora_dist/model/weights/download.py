"""Fetching a hub model's weight files into the local cache, with our own progress in place of a bar for each file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import tqdm

from ...progress import Task, track

log = logging.getLogger(__name__)


def fetch(name: str, revision: str | None, files: Sequence[str], *, is_one_enough: bool = False) -> None:
    """Downloads what is not in the cache at all; `is_one_enough`: nothing if any of the files is.

    Errors are left to the reading that follows, which explains them.
    """
    enough = any if is_one_enough else all
    if enough(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files):
        return
    with track(f"downloading {name}", unit="bytes") as task:
        try:
            snapshot_download(name, revision=revision, allow_patterns=list(files), tqdm_class=_bar_of(task))
        except Exception as error:  # the hub client's errors have no common base class
            log.debug("%s: not downloaded in advance: %s", name, error)


def _bar_of(task: Task) -> type:
    """What the hub's client takes for a bar, and tells how far it is. Its bars of bytes are about the same bytes (what
    was received, what is written), so the one that is furthest counts; others count files."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **options | {"disable": True})
            self.n = options.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes:
                task.total = max(task.total or 0, int(self.total or 0)) or None
                task.to(max(task.done, int(self.n)))

    return Bar
