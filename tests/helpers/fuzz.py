"""Values and files of any kind for tests, and the bounds within which what reads them must end."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qlora_dist.config import parse_config

SECONDS, BYTES = 2.0, 2**29  # of one example: its processor time, and what it adds to the process


class OutOfBounds(BaseException):
    """Not an Exception: no handler may mistake it for an error of the input."""


@contextmanager
def bounded() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfBounds(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, handler)


def ends(act: Callable[[], Any], *allowed: type[Exception]) -> Any:
    """What `act` gives, None after one of the `allowed` errors, each of which must say something, and not a novel."""
    with bounded():
        try:
            return act()
        except allowed as error:
            assert 0 < len(str(error)) < 10_000
            return None


def examples(number: int) -> settings:
    return settings(
        max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


# --- values of any kind -----------------------------------------------------------------------------------------------

# a list of odd values finds more in a second than values drawn from nothing
ODD_TEXTS = [
    "", "a", "auto", "none", "nan", "1e999", "7", "../x", "~nobody", "a\0b", "\ud800", "\x1b[2J", "2024-99-99",
    "é" * 3000,
]  # fmt: skip
ODD = [
    None, True, False, 0, 1, 2, 7, -1, 2**31, 2**63 - 1, 2**63, 10**30, 10**400, 0.5, -0.0, 1e300, 5e-324, float("nan"),
    float("inf"), *ODD_TEXTS, [], [[]], [1], ["a"], [None], [-1, 0.5], {}, {"": {}}, {"a": 1}, {"a": ["b"]},
    [{"a": None}],
]  # fmt: skip
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(max_size=6)
LEAVES = st.sampled_from(ODD)
VALUES = st.one_of(
    LEAVES, LEAVES, st.lists(LEAVES, max_size=3), st.dictionaries(st.sampled_from(ODD_TEXTS), LEAVES, max_size=2)
)
DEEP = "[" * 100_000


def objects(keys: list[str], values: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these keys, and sometimes another."""
    return st.dictionaries(st.sampled_from(keys) | TEXTS, values, max_size=len(keys))


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with a few bytes replaced, inserted or removed, or cut off."""
    edits = st.tuples(st.integers(0, len(content)), st.integers(0, 3), st.binary(max_size=3))

    def apply(changes: list[tuple[int, int, bytes]], end: int) -> bytes:
        now = content
        for at, gone, new in changes:
            now = now[:at] + new + now[at + gone :]
        return now[:end]

    ends_at = st.just(len(content) + 99) | st.integers(0, len(content))
    return st.builds(apply, st.lists(edits, max_size=4), ends_at)


def json_text(value: Any) -> str:
    """JSON of a value, with what Python's own encoder refuses to print."""
    try:
        return json.dumps(value)
    except ValueError:  # integers of thousands of digits
        return "9" * 5000


def altered(good: Any, values: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[str]:
    """JSON of an object with a few of its values, at any depth, replaced or removed; or of something else."""
    places = list(places_of(good))
    changes = st.lists(st.tuples(st.sampled_from(places), values, st.integers(0, 4)), min_size=1, max_size=3)

    def apply(chosen: list[tuple[tuple[Any, ...], Any, int]]) -> str:
        copy = json.loads(json.dumps(good))
        for (*way, last), value, dice in chosen:
            node = copy
            try:
                for part in way:
                    node = node[part]
                if dice == 0 and isinstance(node, dict):
                    node.pop(last, None)
                else:
                    node[last] = value
            except (KeyError, IndexError, TypeError):  # another change has removed it
                continue
        return json_text(copy)

    text = json.dumps(good)
    other = st.one_of(VALUES.map(json_text), st.sampled_from(["", DEEP, "{", '{"a":' * 2000, "9" * 6000, "\x00"]))
    cut = st.integers(0, len(text)).map(lambda end: text[:end])
    return st.one_of(st.builds(apply, changes), st.builds(apply, changes), st.builds(apply, changes), other, cut)


def places_of(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*way, key)
        yield from places_of(inner, (*way, key))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """The same folder for all examples of a test."""
    folder = factory.getbasetemp() / f"fuzz-{name}"
    folder.mkdir(exist_ok=True)
    return folder


CONFIG = {
    "run_dir": "runs/x",
    "model": {"name": "m", "compute_dtype": "float32"},
    "data": {"train": [{"path": "d.json", "columns": {"input": "a"}}], "eval": [{"path": "e.json"}]},
    "train": {"steps": 5},
}
FULL = json.loads(parse_config(CONFIG).model_dump_json())
YAML = st.lists(
    st.sampled_from(
        [*" \n\t:-?,[]{}&*!|>%@`\"'#=.0123456789eE+~", "  ", "\n- ", ": ", "run_dir", "model", "data", "train", "path",
         "&a ", "*a", "<<: ", "!!int ", "!!float ", "!!bool ", "!!binary ", "!!timestamp ", "!!set ", "!!omap ",
         "!!python/object:os.system ", "2024-99-99", "0x", "1e999", ".inf", ".nan", "0o9", "1:99", "null", "true",
         "\ud800", "\x00", "---", "...", "%YAML 1.2", "é", "\u2028"]
    ),
    max_size=25,
).map("".join)  # fmt: skip
