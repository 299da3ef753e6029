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

from ...errors import UserError

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
    elif first == "{" and _parsed(line, "").problem is None:
        yield from read_jsonl(path)
    elif first == "{":
        record = _parsed(path.read_text(encoding="utf-8-sig"), f"{path}, record 1")
        if record.problem:
            raise UserError(f"data source {path}: {record.problem}")
        yield record
    elif first:
        raise UserError(f"data source {path}: expected a JSON list of objects, found {first!r} at the start")


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
            yield _as_record(self._element(number), f"{self.path}, record {number}")
            following = self._next_character()
            if following == ",":
                self.position += 1
                following = self._next_character()
            elif following != "]":
                found = repr(following) if following else "the end of the file"
                raise self._invalid(f"after record {number}", self.position, f"expected , or ] but found {found}")

    def _element(self, number: int) -> Any:
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.window, self.position)
                # a number at the end of the window may continue in the next one
                if end < len(self.window) or not self._read_more():
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                if not self._read_more():
                    raise self._invalid(f"in record {number}", error.pos, error.msg) from None

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
        header = next(reader, [])
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
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data source {path}: not a parquet file ({error})") from None
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for fields in batch.to_pylist():
            number += 1
            yield RawRecord(plain_value(fields), f"{path}, row {number}")


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
    ".txt": read_text,
}


def plain_value(value: Any) -> Any:
    """Converts a value to JSON types: dates, bytes etc. become text."""
    if isinstance(value, dict):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _parsed(text: str, where: str) -> RawRecord:
    try:
        return _as_record(json.loads(text), where)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        return RawRecord(None, where, f"not valid JSON: {error.msg} at {at}")
    except RecursionError:
        return RawRecord(None, where, "JSON nested too deeply")


def _as_record(value: Any, where: str) -> RawRecord:
    if not isinstance(value, dict):
        return RawRecord(None, where, f"expected an object with named fields, found {type(value).__name__}")
    return RawRecord(value, where)
