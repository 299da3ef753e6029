"""What a key of another trainer means here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ...errors import shortened

EACH = "data.train.*."  # before a field of every source in data.train


@dataclass(frozen=True)
class Answer:
    """`values`: what to set, by dotted key. Without any, either nothing has to be set, or `is_lost`: nothing here
    means it. `text`: the reason, or how a value was computed."""

    values: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    is_lost: bool = False
    parts: Mapping[str, tuple[Any, Answer]] = field(default_factory=dict)
    """Of a list or a reference: what each part in it means, by its name there; (value, answer)."""

    def sentence(self) -> str:
        """For an error message."""
        if self.is_lost or self.parts:
            return self.text
        if not self.values:
            return f"leave it out: {self.text}"
        how = f" ({self.text})" if self.text else ""
        return f"set {' and '.join(f'{named(key)}: {shown(value)}' for key, value in self.values.items())}{how}"


@dataclass(frozen=True)
class Given:
    """What stands beside a key."""

    fields: Mapping[str, Any]  # every key that was given, by its dotted name
    gpus: int | None = None  # None: not known
    trainer: str = ""  # empty: not known
    folders: tuple[Path, ...] = ()  # where a file that the config names may be

    def first(self, names: tuple[str, ...]) -> Any:
        """The value of the first of these keys that has one."""
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)


Rule = Callable[[Any, Given], Answer]


def lost(text: str) -> Answer:
    """Nothing here means it."""
    return Answer(text=text, is_lost=True)


def same(key: str) -> Rule:
    """The same meaning under another name."""
    return lambda value, _: Answer({key: value})


def default(text: str) -> Rule:
    """Nothing has to be set, whatever the value."""
    return lambda value, _: Answer(text=text)


def never(text: str) -> Rule:
    """Nothing means it, unless it is switched off."""
    return lambda value, _: Answer(text="off, as it always is here") if value in (False, 0) else lost(text)


def one_of(key: str, names: Mapping[str, str]) -> Rule:
    """A name among several, in another spelling."""

    def answer(value: Any, _: Given) -> Answer:
        name = names.get(str(value).lower())
        known = ", ".join(dict.fromkeys(names.values()))
        return Answer({key: name}) if name else lost(f"here it is {key}, one of {known}")

    return answer


def switch(on: Answer, off: Answer) -> Rule:
    """Something that is on or off."""
    return lambda value, _: on if value is True or str(value).lower() in ("auto", "true") else off


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number above 0."""
    return type(value) is int and value > 0


def named(key: str) -> str:
    """A dotted key in words."""
    return f"in each source of data.train {key.removeprefix(EACH)}" if key.startswith(EACH) else key


def shown(value: Any) -> str:
    """A value as in YAML, on one line, of bounded length."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif value is None:
        text = "null"
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(map(shown, value[:20]))}{', ...' if len(value) > 20 else ''}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{name}: {shown(one)}' for name, one in list(value.items())[:20])}}}"
    else:
        text = value if isinstance(value, str) else shortened(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
