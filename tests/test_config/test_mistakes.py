"""A law over the schema: a wrong value of any key is one line with that key, what was expected, and what was found."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from helpers.tiny_run import changed
from pydantic import BaseModel

from qlora_dist.config import RunConfig, parse_config
from qlora_dist.config.mistakes import found
from qlora_dist.errors import UserError

MINIMAL = {
    "run_dir": "runs/x",
    "model": {"name": "m"},
    "data": {"train": [{"path": "d.json"}], "eval": [{"path": "e.json"}]},
    "train": {"steps": 3},
}
# value -> how it is shown
WRONG: tuple[tuple[Any, str], ...] = (
    ("zz", "'zz'"),
    (-7, "-7"),
    (2.5, "2.5"),
    (10**15, "1000000000000000"),
    (True, "true"),
    (None, "null"),
    ([[1]], "[[...]]"),
    ([{"a": 1}, 2, False, None, "t"], "[{...}, 2, false, null, 't']"),
    ({"a": {"b": 1}}, "a section with the key a"),
    ({"a": 1, "b": 2}, "a section with the keys a, b"),
    ({}, "an empty section"),
    (datetime.date(2024, 1, 1), "2024-01-01"),
    (b"x", "binary data"),
)
# pydantic's and Python's own words
INTERNAL = re.compile(
    r"Input should|constrained|literal\[|pydantic|Value error|Model|Config\b|\[type=|<class|datetime\.|"
    r"\b(None|NoneType|True|False|str|int|float|bool|bytes|dict|tuple|frozenset|union|Optional|valid \w+)\b"
)


def _leaves(model: type[BaseModel] = RunConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Each key that is no section of keys, as a path; sections in a list by the index 0."""
    for name, field in model.model_fields.items():
        inner = [
            (section, step)
            for one, step in [(field.annotation, ()), *((one, ()) for one in get_args(field.annotation))]
            if isinstance(section := one, type) and issubclass(section, BaseModel)
        ]
        is_list = str(field.annotation).startswith("tuple[")
        yield from [(*path, name)] if not inner or is_list else []
        for section, _ in inner:
            yield from _leaves(section, (*path, name, *(["0"] if is_list else [])))


LEAVES = sorted(".".join(path) for path in _leaves())


def _with(key: str, value: Any) -> dict[str, Any]:
    raw = changed(MINIMAL)
    node: Any = raw
    *sections, last = key.split(".")
    for part in sections:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return raw


def _said(key: str, value: Any) -> list[str]:
    """The lines of the message; none if the value is right there."""
    try:
        parse_config(_with(key, value), "FILE")
    except UserError as error:
        return str(error).removeprefix("FILE: ").splitlines()
    return []


def test_the_whole_schema_is_tried() -> None:
    assert {"seed", "lora.target_modules", "data.train", "data.train.0.columns", "train.eval_rows"} <= set(LEAVES)
    assert len(LEAVES) > 70


@pytest.mark.parametrize("key", LEAVES)
def test_a_wrong_value_is_told_by_its_key_what_was_expected_and_what_was_found(key: str) -> None:
    refused = [(value, shown, said) for value, shown in WRONG if (said := _said(key, value))]
    assert len(refused) >= 7, key
    for value, shown, said in refused:
        for line in said:
            assert re.match(rf"{re.escape(key)}(\.\w+)*: ", line) or _is_between_keys(line), line
            assert not INTERNAL.search(line), line
        # of a list or section, what is in it may be named instead
        itself = [line for line in said if line.startswith(f"{key}: ")]
        assert len(itself) <= 1 and (itself or isinstance(value, list | dict) or _is_between_keys(said[0])), said
        assert not itself or len(said) == 1 or any(map(_is_between_keys, said)), said  # not the same in other words
        for line in itself:
            assert "expected " in line or "set exactly one" in line, line
            assert f"(found {shown}" in line or "set exactly one" in line, line


def _is_between_keys(line: str) -> bool:
    """A rule over several keys, which names them itself."""
    of_source = r"data\.(train|eval)\.0: (shuffle|part is|hold_out is)"
    return re.match(rf"train: set exactly one of|train\.eval_every is|lora is null|{of_source}", line) is not None


def test_what_was_found_is_shown_as_yaml_has_it_and_short() -> None:
    assert found({"a" * 100: 1}).startswith("a section with the key 'aaa")
    assert found(list(range(100))) == "[0, 1, 2, 3, 4, 5, ...]"
    assert len(found(["x" * 10**5] * 10)) < 800 and len(found({str(i): i for i in range(10**4)})) < 100
    assert found(datetime.datetime(2024, 1, 1, 2, 3)) == "2024-01-01T02:03:00"


@pytest.mark.parametrize("word", ["off", "no", "yes", "on", "y"])
def test_words_that_older_yaml_reads_as_truth_values_are_words(word: str, tmp_path: Any) -> None:
    from qlora_dist.config import dump_yaml, load_config

    path = tmp_path / "c.yaml"
    path.write_text("run_dir: x\nmodel: {name: m, kernels: off}\ntrain: {steps: 1}\n"
                    f"data: {{train: [{{path: d}}], packing: off, template: {word}}}\n")  # fmt: skip
    config = load_config(path)
    assert (config.model.kernels, config.data.packing, config.data.template) == ("off", False, word)
    path.write_text(dump_yaml(config))
    assert load_config(path) == config
