"""How far long work has come: told by the code that does it, at any level, and shown by whoever speaks to a person.

    with track("tokenizing record", total) as task:   # downloads, quantizing, tokenizing, packing, loading, ...
        task.add()

`shown_by` enters the place where it is shown (`console.Console`); the newest one counts. Without any, nothing happens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, Protocol, TypeVar

from .files import format_bytes

Unit = Literal["count", "share", "bytes"]  # 1,200/4,000, 30%, or 1.20 GiB/4.00 GiB
TELL_SECONDS = 0.1  # between two states of a task


class Shows(Protocol):
    """Where progress is shown."""

    def now(self) -> float: ...

    def progress(
        self,
        what: str,
        done: int,
        total: int | None,
        fields: Sequence[str],
        more: Sequence[str] = (),
        is_edge: bool = False,
        amount: str | None = None,
    ) -> None: ...

    def end_progress(self) -> None: ...


_places: list[Shows] = []


@contextmanager
def shown_by(place: Shows) -> Iterator[None]:
    """Inside, tasks are shown there, and only there."""
    _places.append(place)
    try:
        yield
    finally:
        _places.remove(place)


class Task:
    """Work that has begun. `total` may be set later, or never."""

    def __init__(self, what: str, total: int | None, unit: Unit) -> None:
        self.total = total
        self.done = 0
        self._what, self._unit = what, unit
        self._place = _places[-1] if _places else None
        self._started = self._told = self._place.now() if self._place is not None else 0.0

    def add(self, count: int = 1) -> None:
        """`count` more are done."""
        self.to(self.done + count)

    def to(self, done: int) -> None:
        """So many are done."""
        self.done = done
        if self._place is None or (now := self._place.now()) - self._told < TELL_SECONDS:
            return
        self._told = now
        elapsed = now - self._started
        fields = [f"elapsed {format_seconds(elapsed)}"]
        if self.total and done:
            fields.insert(0, f"left {format_seconds(elapsed / done * max(0, self.total - done))}")
        self._place.progress(self._what, done, self.total, fields, amount=self._amount())

    def _amount(self) -> str:
        if self._unit == "bytes":
            return format_bytes(self.done) + (f"/{format_bytes(self.total)}" if self.total else "")
        if self._unit == "share" and self.total:
            return f"{min(self.done / self.total, 1):.0%}"
        return f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")

    def close(self) -> None:
        """The work has ended: its line makes way."""
        if self._place is not None:
            self._place.end_progress()


@contextmanager
def track(what: str, total: int | None = None, unit: Unit = "count") -> Iterator[Task]:
    """Shows how far the work of the block is. `total` None: not known."""
    task = Task(what, total, unit)
    try:
        yield task
    finally:
        task.close()


Item = TypeVar("Item")


def each(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items, shown one after another as work on them."""
    with track(what, len(items)) as task:
        for item in items:
            yield item
            task.add()


@contextmanager
def followed(task: Task, count: Callable[[], int]) -> Iterator[None]:
    """Shows what `count` says is done, for work that cannot tell itself, such as that of other processes."""
    ended = threading.Event()

    def follow() -> None:
        with suppress(OSError):  # a pipe without a reader ends the main thread, too
            while not ended.wait(TELL_SECONDS):
                task.to(count())

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def format_seconds(seconds: float) -> str:
    """1:02:03, or 2:03 below one hour."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
