"""JSON text of unknown origin: decoded, or refused with a reason. Never a traceback, never a value lost."""

from __future__ import annotations

import json
import re
from typing import Any

# what matters for the end of a list or object: whole texts, brackets, and a text that is cut off
_PIECES = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)
_NUMBER = re.compile(r"[-+.0-9eE]+")


class Unusable(ValueError):
    """Well-formed JSON that cannot be used."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Unusable(f"an object has the key {twice!r} twice")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def decode(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, see `explain`, also for what Python refuses to hold."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise Unusable("JSON nested too deeply") from None


def decode_at(text: str, begin: int) -> tuple[Any, int]:
    """The value that begins at a position, and its end. Raises ValueError, see `explain`."""
    try:
        return _DECODER.raw_decode(text, begin)
    except RecursionError:
        raise Unusable("JSON nested too deeply") from None


def end_of_value(text: str, begin: int) -> int | None:
    """The end of an Unusable value that begins at a position, without decoding it; None: not in this text."""
    if number := _NUMBER.match(text, begin):
        return number.end() if number.end() < len(text) else None
    depth = 0
    for piece in _PIECES.finditer(text, begin):
        if piece[0] == '"':
            return None
        depth += (piece[0] in "[{") - (piece[0] in "]}")
        if depth == 0:
            return piece.end()
    return None


def explain(error: ValueError) -> str:
    """Why a text could not be decoded."""
    if isinstance(error, json.JSONDecodeError):
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        return f"not valid JSON: {error.msg} at {at}"
    return str(error) if isinstance(error, Unusable) else "a number with thousands of digits"
