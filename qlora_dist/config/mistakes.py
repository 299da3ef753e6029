"""What is wrong in a config, in the user's terms: the key as it was written, what was expected there, what was found.

pydantic tells how each alternative of a type failed, by names of its own. What is expected is read from the annotations
instead, so that a key of several types is one sentence.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..errors import shortened
from .foreign.table import answer as foreign_answer
from .foreign.table import given_fields
from .sections import MANY, RunConfig

MAX_MISTAKES = 40  # that are listed
SHOWN_ITEMS = 6  # of a list or mapping that was found
OWN_WORDS = ("value_error", "assertion_error")  # of our validators: their text is the message


@dataclass(frozen=True)
class Place:
    """Where a mistake is: the key as the user wrote it, and what is declared there."""

    keys: tuple[int | str, ...]
    annotation: Any
    bounds: tuple[Any, ...] = ()

    def at(self, part: int | str) -> Place | None:
        """The place one key further down; None if `part` is no key here but pydantic's name of an alternative."""
        for one, _ in _members(self.annotation, ()):
            inner = _inner(one, part)
            if inner is not None:
                return Place((*self.keys, part), *inner)
        return None

    @property
    def name(self) -> str:
        return ".".join(map(_shown, self.keys))


def explain(error: ValidationError, origin: str, raw: Any) -> str:
    """One line for each key that is wrong, after `origin`."""
    lines: dict[tuple[int | str, ...], str] = {}
    given = given_fields(raw)
    for item in error.errors(include_url=False)[:MAX_MISTAKES]:
        place, unknown = _place(item["loc"])
        if item["type"] in ("extra_forbidden", "invalid_key"):  # invalid: no text
            place = Place((*place.keys, "" if unknown is None else unknown), None)
            hint = foreign_answer(str(place.keys[-1]), item["input"], given) or _nearest(place.keys)
            line = f"unknown key; {hint}"
        elif item["type"] in OWN_WORDS:
            is_whole = isinstance(item["input"], dict | BaseModel)
            line = item["msg"].removeprefix("Value error, ") + ("" if is_whole else f" (found {found(item['input'])})")
        else:
            if item["type"] == "missing" and isinstance(place.keys[-1], int):  # of a list of fixed length
                place = _place(place.keys[:-1])[0]
            line = _explained(item["type"], item["input"], place, given)
        lines.setdefault(place.keys, f"{place.name}: {line}" if place.keys else line)
    # of a list, its items are wrong rather than that it is no name: the other alternative of its type
    shown = [line for keys, line in lines.items() if not any(keys == more[: len(keys)] != more for more in lines)]
    more = error.error_count() - MAX_MISTAKES
    return f"{origin}: " + "\n".join([*shown, *([f"and {more:,} more"] if more > 0 else [])])


def _explained(kind: str, value: Any, place: Place, given: dict[str, Any]) -> str:
    """The rest of the line of a value that is none of what its annotation allows."""
    wanted = expected(place.annotation, place.bounds, is_too_large=kind.startswith("less_than"))
    if kind == "missing" and isinstance(value, dict):
        return f"missing; it has no default; expected {wanted}"
    advice = ""
    if kind == "model_type" and isinstance(value, str) and (other := foreign_answer(place.name, value, given)):
        return f"expected a section of keys; {other} (found {found(value)})"
    names = [str(one) for one in _names(place.annotation)]
    if isinstance(value, str) and (near := _near(value.lower(), names)):
        advice = f"; did you mean {near[0]}?"
    elif isinstance(value, bool | int | float | datetime.date) and "text" in wanted and kind == "string_type":
        advice = "; put it in quotes"
    elif isinstance(value, dict) and wanted.startswith("a list of sections"):
        advice = "; begin it with '- '"
    elif isinstance(value, str) and wanted.startswith("a list of sections"):
        advice = f"; write [{{path: {_shown(value)}}}]"
    return f"expected {wanted} (found {found(value)}{advice})"


# --- what was expected ------------------------------------------------------------------------------------------------


def expected(annotation: Any, bounds: tuple[Any, ...] = (), is_too_large: bool = False) -> str:
    """What an annotation allows, in words. `is_too_large`: also a limit that no one meets by chance."""
    several = sorted(dict.fromkeys(_each_expected(annotation, bounds, is_too_large)), key=lambda one: "such as" in one)
    if len(several) == 1:
        return several[0]
    comma = "," if len(several) > 2 or any(" " in one for one in several) else ""
    return f"{', '.join(several[:-1])}{comma} or {several[-1]}"


def _each_expected(annotation: Any, bounds: tuple[Any, ...], is_too_large: bool) -> Iterator[str]:
    for one, limits in _members(annotation, bounds):
        origin, arguments = get_origin(one), get_args(one)
        if origin is Literal:
            yield from map(str, arguments)
        elif origin is tuple:
            inner = expected(arguments[0], (), is_too_large)
            if arguments[-1] is not ... and len(arguments) > 1:
                yield f"a list of {len(arguments)}, each {inner}"
            else:
                names = ", such as [a, b]" * (inner == "text")
                yield f"a list of {inner.replace('a section of', 'sections of')}{names}"
        elif origin is dict:
            yield "pairs of names, such as {name: other}"
        elif _section_of(one) is not None:
            yield f"a section of keys, such as {', '.join(list(one.model_fields)[:3])}"
        else:
            kind = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}.get(one, "text")
            yield kind + (_range(limits, one, is_too_large) if one in (int, float) else "")


def _range(bounds: tuple[Any, ...], kind: type, is_too_large: bool) -> str:
    limits = {
        sign: getattr(bound, name)
        for bound in bounds
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if hasattr(bound, name)
    }
    if not is_too_large and limits.get("<=", 0) >= MANY:
        del limits["<="]
    if kind is int and limits.keys() == {">=", "<="}:
        return f" from {limits['>=']:,} to {limits['<=']:,}"
    return "".join(
        f" {'and ' if i else ''}{sign} {f'{limit:,}'.removesuffix('.0')}"
        for i, (sign, limit) in enumerate(limits.items())
    )


def _members(annotation: Any, bounds: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The alternatives of a type with their bounds."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        declared = [limit for one in more for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
        yield from _members(inner, (*bounds, *declared))
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _members(one, bounds)
    else:
        yield annotation, bounds


def _inner(annotation: Any, part: int | str) -> tuple[Any, tuple[Any, ...]] | None:
    """(annotation, bounds) of a field, an item or a value."""
    section, origin, arguments = _section_of(annotation), get_origin(annotation), get_args(annotation)
    if section is not None and part in section.model_fields:
        field = section.model_fields[str(part)]
        return field.annotation, tuple(field.metadata)
    if origin is tuple and isinstance(part, int):
        return arguments[min(part, len(arguments) - 1) if arguments[-1] is not ... else 0], ()
    if origin is dict and part != "[key]":
        return arguments[1], ()
    return None


def _names(annotation: Any) -> Iterator[Any]:
    for one, _ in _members(annotation, ()):
        if get_origin(one) is Literal:
            yield from get_args(one)


def _near(word: str, names: list[str]) -> list[str]:
    """The name that a word may stand for: one that resembles it, or that it begins with."""
    return difflib.get_close_matches(word, names, n=1, cutoff=0.75) or [
        name for name in names if word.startswith((f"{name}_", f"{name}-"))
    ]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


# --- what was found ---------------------------------------------------------------------------------------------------


def found(value: Any) -> str:
    """A value as it stands in YAML, short; of a section, its keys."""
    if isinstance(value, dict):
        keys = ", ".join(map(_shown, list(value)[:SHOWN_ITEMS])) + ", ..." * (len(value) > SHOWN_ITEMS)
        return f"a section with {'the key' if len(value) == 1 else 'the keys'} {keys}" if value else "an empty section"
    if isinstance(value, list | tuple | set | frozenset):
        items = [_item(one) for one in list(value)[:SHOWN_ITEMS]] + ["..."] * (len(value) > SHOWN_ITEMS)
        return f"[{', '.join(items)}]"
    return _item(value)


def _item(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{...}" if value else "{}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[...]" if value else "[]"
    if isinstance(value, bytes):
        return "binary data"
    if isinstance(value, datetime.date | datetime.datetime):
        return value.isoformat()
    return "null" if value is None else shortened(value)


# --- where ------------------------------------------------------------------------------------------------------------


def _place(location: tuple[int | str, ...]) -> tuple[Place, int | str | None]:
    """The deepest place that pydantic's location names, and its last part if that is no key of the schema."""
    place, unknown = Place((), RunConfig), None
    for part in location:
        further = place.at(part)
        place, unknown = (place, part) if further is None else (further, None)
    return place, unknown


def _shown(part: Any) -> str:
    """A key as the user wrote it, unless that could not stand in one line."""
    return str(part) if re.fullmatch(r"[\w-]{1,60}", str(part)) else shortened(part)


def _nearest(keys: tuple[int | str, ...]) -> str:
    place, _ = _place(keys[:-1])
    sections = [section for one, _ in _members(place.annotation, ()) if (section := _section_of(one)) is not None]
    siblings = [name for section in sections for name in section.model_fields]
    near = difflib.get_close_matches(_shown(keys[-1]), siblings, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    elsewhere = [f"{name}{keys[-1]}" for name, section in _sections() if keys[-1] in section.model_fields]
    return f"did you mean {elsewhere[0]}?" if elsewhere else f"known keys: {', '.join(siblings)}"


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections of the config with what stands before the names of their keys; at first the top level."""
    yield "", RunConfig
    for name, field in RunConfig.model_fields.items():
        yield from ((f"{name}.", section) for one, _ in _members(field.annotation, ()) if (section := _section_of(one)))
