"""One reader per file type: a path -> records, each with its location. Streams; never holds a whole file in memory.

The location, "data/a.jsonl, line 17", goes into messages. A line or record that cannot be parsed comes with the
reason instead of fields, so that the caller can decide (data.on_bad) and count. A fault that makes the rest of the
file unreadable (in a JSON list, a compressed table) is always an error.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ...errors import UserError, shortened
from . import json_text
from .fields import type_name

# Approximate characters per part of a .txt document: a book fits into memory at once, a whole dump does not.
_TEXT_PART = 2**22


@dataclass(frozen=True)
class RawRecord:
    """A record as read. `problem`: why there are no fields."""

    fields: dict[str, Any] | None
    where: str
    problem: str | None = None
    is_first: bool = True  # part of its document; a whole document is both
    is_last: bool = True


def read_jsonl(path: Path) -> Iterator[RawRecord]:
    """One object per line. Lines are decoded separately, so one in another encoding does not hide the others."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield RawRecord(None, where, f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
                continue
            yield _parsed(text, where)


def read_json(path: Path) -> Iterator[RawRecord]:
    """A list of objects, one object, or (as in many `.json` datasets) one object per line."""
    with path.open(encoding="utf-8-sig") as file:
        line = " "
        while line and not line.strip():
            line = file.readline()
    first = line.strip()[:1]
    if first == "[":
        with path.open(encoding="utf-8-sig") as file:
            yield from _JsonList(path, file).records()
    elif first == "{" and _is_decodable(line):
        yield from read_jsonl(path)
    elif first == "{":
        record = _parsed(path.read_text(encoding="utf-8-sig"), f"{path}, record 1")
        if record.problem and line.rstrip().endswith("}"):  # one object per line, and the first is damaged
            yield from read_jsonl(path)
            return
        if record.problem:
            raise UserError(f"data source {path}: {record.problem}; cannot read the rest of the file")
        yield record
    elif first:
        raise UserError(f"data source {path}: expected a JSON list of objects, found {first!r} at the start")


def _is_decodable(line: str) -> bool:
    """Whether a line is complete JSON, usable or not."""
    try:
        json_text.decode(line)
    except json.JSONDecodeError:
        return False
    except ValueError:
        return True
    return True


class _JsonList:
    """Decodes the elements of a JSON list one by one from a sliding window of the file."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path = path
        self.file = file
        self.window = ""
        self.position = 0
        self.line = 1  # at the start of the window

    def records(self) -> Iterator[RawRecord]:
        number = 0
        self._next_character()
        self.position += 1  # the opening bracket
        following = self._next_character()
        while following != "]":
            number += 1
            where = f"{self.path}, record {number}"
            try:
                value, problem = self._element(number), None
            except json_text.Unusable as error:
                value, problem = None, str(error)
            yield RawRecord(None, where, problem) if problem else _as_record(value, where)
            following = self._next_character()
            if following == ",":
                self.position += 1
                following = self._next_character()
            elif following != "]":
                found = repr(following) if following else "the end of the file"
                raise self._invalid(f"after record {number}", self.position, f"expected , or ] but found {found}")
        self.position += 1  # the closing bracket
        if following := self._next_character():
            raise self._invalid(
                "after the end of the list", self.position, f"found {following!r}; write several lists as one"
            )

    def _element(self, number: int) -> Any:
        """Raises Unusable, with the position after the element, if only this one is lost."""
        while True:
            try:
                value, end = json_text.decode_at(self.window, self.position)
                # a number at the end of the window may continue in the next one
                if end < len(self.window) or not self._read_more():
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                if not self._read_more():
                    raise self._invalid(f"in record {number}", error.pos, error.msg) from None
            except ValueError as error:
                reason = json_text.explain(error)
                while (end_of := json_text.end_of_value(self.window, self.position)) is None:
                    if not self._read_more():
                        raise self._invalid(f"in record {number}", self.position, reason) from None
                self.position = end_of
                raise json_text.Unusable(reason) from None

    def _next_character(self) -> str:
        while True:
            while self.position < len(self.window) and self.window[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.window) or not self._read_more():
                return self.window[self.position : self.position + 1]

    def _read_more(self) -> bool:
        # the window doubles when an element does not fit, so that a huge one is not decoded again for every chunk
        chunk = self.file.read(max(1 << 20, len(self.window)))
        if chunk:
            self.line += self.window.count("\n", 0, self.position)
            self.window, self.position = self.window[self.position :] + chunk, 0
        return bool(chunk)

    def _invalid(self, where: str, position: int, reason: str) -> UserError:
        line = self.line + self.window.count("\n", 0, position)
        return UserError(
            f"data source {self.path}: invalid JSON {where}, line {line}: {reason}; cannot read the rest of the file"
        )


def read_table(path: Path) -> Iterator[RawRecord]:
    """Comma- or tab-separated values with a header; every value is text."""
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = next((row for row in reader if row), [])
        except csv.Error as error:
            raise UserError(f"data source {path}: invalid header, line {reader.line_num}: {error}") from None
        if twice := [name for name in header if header.count(name) > 1]:
            raise UserError(f"data source {path}: two columns are named {shortened(twice[0])}; rename or remove one")
        while True:
            where = f"{path}, line {reader.line_num + 1}"  # where the row starts; it may span several lines
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"data source {path}: invalid table, line {reader.line_num}: {error}; cannot read the rest of it"
                ) from None
            if row is None:
                return
            if row and len(row) != len(header):
                problem = f"{len(row)} columns, expected {len(header)} ({', '.join(header)})"
                yield RawRecord(None, where, problem)
            elif row:
                yield RawRecord(dict(zip(header, row)), where)


def read_parquet(path: Path) -> Iterator[RawRecord]:
    import pyarrow.parquet

    yield from _table_rows(path, lambda: pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024))


def read_arrow(path: Path) -> Iterator[RawRecord]:
    """A stream of Arrow's IPC format, as `save_to_disk` of `datasets` writes it."""
    import pyarrow

    def batches() -> Iterator[Any]:
        for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))):
            batch.validate(full=True)  # offsets of a damaged file would point anywhere
            yield from (batch.slice(begin, 1024) for begin in range(0, len(batch), 1024))

    yield from _table_rows(path, batches)


def _table_rows(path: Path, open_batches: Callable[[], Iterator[Any]]) -> Iterator[RawRecord]:
    """Rows of record batches. A value that Python cannot hold (a date after the year 9999) spoils its row alone."""
    import pyarrow

    number = 0
    try:
        batches = open_batches()
        while (batch := next(batches, None)) is not None:
            # a batch is converted at once, or row by row to find the one that cannot be
            rows = _converted(batch)
            if rows is None:
                rows = [row for i in range(len(batch)) for row in _converted(batch.slice(i, 1)) or [None]]
            for fields in rows:
                number += 1
                where = f"{path}, row {number}"
                if fields is None:
                    yield RawRecord(None, where, "a value that Python cannot hold, such as a date after the year 9999")
                else:
                    yield RawRecord(fields, where)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        after = f"cannot be read after row {number}" if number else f"not {_A_FILE[path.suffix]}"
        raise UserError(f"data source {path}: {after} ({error})") from None


_A_FILE = {".parquet": "a parquet file", ".arrow": "an Arrow stream"}


def _converted(batch: Any) -> list[dict[str, Any] | None] | None:
    try:
        return [plain_value(fields) for fields in batch.to_pylist()]
    except (ValueError, OverflowError):
        return None


def read_text(path: Path) -> Iterator[RawRecord]:
    """The whole file is one document, or several separated by lines of <|endoftext|>."""
    number, is_first, size = 1, True, 0
    lines: list[str] = []

    def part(is_last: bool) -> RawRecord:
        return RawRecord({"text": "".join(lines)}, f"{path}, document {number}", None, is_first, is_last)

    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip() == "<|endoftext|>":
                yield part(is_last=True)
                number, is_first, size, lines = number + 1, True, 0, []
                continue
            if size > _TEXT_PART:
                yield part(is_last=False)
                is_first, size, lines = False, 0, []
            lines.append(line)
            size += len(line)
    if any(line.strip() for line in lines):
        yield part(is_last=True)


READERS: dict[str, Callable[[Path], Iterator[RawRecord]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
}


# Objects of the user's own making: a table gives each one the keys of all the others, with null
_OPEN_OBJECTS = {"tools", "functions", "arguments", "parameters"}


def plain_value(value: Any, is_open: bool = False) -> Any:
    """Converts a value of a table to JSON types: dates etc. become text. Nulls that the table added are removed."""
    if isinstance(value, dict):
        return {
            str(key): plain_value(inner, is_open or key in _OPEN_OBJECTS)
            for key, inner in value.items()
            if inner is not None or not is_open
        }
    if isinstance(value, list | tuple):
        return [plain_value(inner, is_open) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _parsed(text: str, where: str) -> RawRecord:
    try:
        return _as_record(json_text.decode(text), where)
    except ValueError as error:
        return RawRecord(None, where, json_text.explain(error))


def _as_record(value: Any, where: str) -> RawRecord:
    if not isinstance(value, dict):
        return RawRecord(None, where, f"expected an object with named fields, found {type_name(value)}")
    return RawRecord(value, where)
