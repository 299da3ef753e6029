"""Part of a split in the hub's syntax: train, train[:90%], train[-100:], train[10:20]."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from ...errors import UserError

_SLICE = re.compile(r"(?P<name>[\w.-]+)(\[(?P<begin>-?\d{1,15}%?)?:(?P<end>-?\d{1,15}%?)?\])?")


@dataclass(frozen=True)
class SplitPart:
    """A split by name, and which of its records: from `begin` up to `end`, as numbers, percentages or None."""

    name: str
    begin: str | None = None
    end: str | None = None

    def select(self, read: Callable[[], Iterator]) -> Iterator:
        """The chosen ones of `read()`. A percentage, or a number from the end, needs a first pass to count them."""
        needs_total = any(edge and (edge.startswith("-") or edge.endswith("%")) for edge in (self.begin, self.end))
        total = sum(1 for _ in read()) if needs_total else 0
        begin, end = self._edge(self.begin, total), self._edge(self.end, total)
        return islice(read(), begin or 0, end if end is None else max(begin or 0, end))

    @staticmethod
    def _edge(edge: str | None, total: int) -> int | None:
        if edge is None:
            return None
        value = round(int(edge[:-1]) * total / 100) if edge.endswith("%") else int(edge)
        return max(0, total + value) if edge.startswith("-") else value


def parse_split(path: str, split: str) -> SplitPart:
    """Raises UserError for the rest of the hub's syntax (sums of splits, rounding)."""
    found = _SLICE.fullmatch(split.strip())
    if found is None:
        raise UserError(
            f"data source {path}: split {split!r} cannot be read from files; expected a name, or a part of it such as "
            "train[:90%] or train[100:200]"
        )
    return SplitPart(found["name"], found["begin"], found["end"])
