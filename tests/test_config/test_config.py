"""Every mistake in a config is found before anything runs and reported with its key."""

import json
import os
import typing
from typing import Literal

import pytest
import yaml
from helpers.tiny_run import changed
from pydantic import BaseModel

from qlora_dist.config import RunConfig, dump_yaml, json_schema, load_config, parse_config
from qlora_dist.errors import UserError

MINIMAL = {"run_dir": "runs/x", "model": {"name": "m"}, "data": {"train": [{"path": "d.json"}]}, "train": {"steps": 3}}


def _load(tmp_path, raw, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__learning_rate": 1e-4}, r"optim\.learning_rate: unknown key; set optim\.lr: 0\.0001"),
        ({"optim__wieght_decay": 0.1}, r"optim\.wieght_decay: unknown key; did you mean weight_decay\?"),
        ({"modle": {"name": "x"}}, r"modle: unknown key; did you mean model\?"),
        (
            {"data__train": [{"path": "d", "fromat": "alpaca"}]},
            r"data\.train\.0\.fromat: unknown key; did you mean format",
        ),
        ({"data__train": []}, r"data\.train: expected at least one source \{path: \.\.\.\} \(found \[\]\)"),
        ({"train": {"steps": 3, "epochs": 1}}, "exactly one of train.steps and train.epochs"),
        ({"train": {}}, "exactly one of train.steps and train.epochs"),
        ({"train__eval_rows": 0}, r"train\.eval_rows: expected a whole number >= 1, or all \(found 0\)$"),
        ({"train__eval_rows": "some"}, r"train\.eval_rows: expected a whole number >= 1, or all \(found 'some'\)$"),
        ({"lora__rank": 0}, r"lora\.rank: expected a whole number from 1 to 65,536 \(found 0\)"),
        ({"lora": None}, "quantized weights cannot be trained; set model.quantization=none"),
        (
            {"model__compute_dtype": "float16"},
            r"expected bfloat16 or float32 \(found 'float16'; did you mean bfloat16\?\)",
        ),
        ({"model__quantization": "nf5"}, r"model\.quantization: expected nf4, fp4, int8, or none \(found 'nf5'\)"),
        ({"train__eval_every": 2}, "data.eval is empty"),
        ({"data__train": [{"path": "d", "hold_out": 1.5}]}, "expected a fraction below 1, or a whole number"),
        (
            {"memory__recompute": -1},
            r"recompute: expected auto, full, none, or a whole number from 0 to .* \(found -1\)",
        ),
        (
            {"optim__schedule": "cosin"},
            r"expected constant, linear, or cosine \(found 'cosin'; did you mean cosine\?\)",
        ),
        ({"data__train": "my.json"}, r"data\.train: expected a list of sections .*; write \[\{path: 'my\.json'\}\]\)"),
        ({"data__train": {"path": "x"}}, r"\(found a section with the key path; begin it with '- '\)"),
        (
            {"lora__target_modules": ["q", 3]},
            r"^config: lora\.target_modules\.1: expected text \(found 3; put it in quotes",
        ),
        (
            {"lora__target_modules": "q"},
            r"^config: lora\.target_modules: expected all-linear, or a list of text, such as",
        ),
        ({"optim__betas": [0.9]}, r"optim\.betas: expected a list of 2, each a number >= 0 and < 1 \(found \[0\.9\]\)"),
        ({"run_dir": None}, r"run_dir: expected text \(found null\)"),
    ],
)
def test_each_mistake_is_reported_with_its_key(changes, message):
    with pytest.raises(UserError, match=message):
        parse_config(changed(MINIMAL, **changes))


def test_a_missing_section_is_reported():
    with pytest.raises(UserError, match=r"data: missing; it has no default"):
        parse_config({key: value for key, value in MINIMAL.items() if key != "data"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected a mapping of sections"),
        ("a: [1\n", "not valid YAML"),
        ("run_dir: a\nrun_dir: b\n", "'run_dir' appears twice, again on line 2"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("run_dir: a\nmodel:\n\tname: b\n", "line 3, column 1: found character .* YAML takes no tabs"),
        ("run_dir: a\n  seed: 1\n", "line 2, column 7: mapping values .*; text that holds ': ' needs quotes"),
        ("run_dir: a\n model: b\nx: 1\n", "line 2"),
        ("model:\n    name: b\n  x: 1\n", "line 3, column 3: .* is it indented like the lines"),
    ],
)
def test_invalid_config_files_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        _load(tmp_path, text)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")


def test_overrides_parse_yaml_values_and_reach_lists(tmp_path):
    config = _load(
        tmp_path,
        MINIMAL,
        "optim.lr=3e-5",
        "lora.target_modules=[q_proj, v_proj]",
        "data.train.0.max_examples=7",
        "train.eval_every=null",
        "model.double_quant=false",
        "batch.rows_per_step=1e2",
    )
    assert config.optim.lr == 3e-5 and config.batch.rows_per_step == 100
    assert config.lora is not None and config.lora.target_modules == ("q_proj", "v_proj")
    assert config.data.train[0].max_examples == 7
    assert config.model.double_quant is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "expected section.key=value"),
        ("data.train.1.path=x", "is a list of length 1; expected an index from 0 to 0"),
        ("run_dir.x=1", "run_dir is a value, not a section"),
        ("optim.lr=[1", "the value: not valid YAML"),
        ("optim.lrr=1", "unknown key; did you mean lr"),
    ],
)
def test_invalid_overrides_are_explained(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        _load(tmp_path, MINIMAL, override)


def test_a_dumped_config_loads_as_an_equal_config(tmp_path):
    config = _load(tmp_path, MINIMAL, "optim.lr=1e-7", "lora.target_modules=[a]", "optim.betas=[0.8, 0.95]")
    again = _load(tmp_path, dump_yaml(config))
    assert again == config and dump_yaml(again) == dump_yaml(config)


# --- hostile and impossible values -----------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "run_dir: *i\n", "aliases .* expand to more than"),
        ("a: &a [*a]\n", "aliases .* expand to more than"),
        (f"run_dir: &a {'x' * 1000}\nb: [{', '.join(['*a'] * 5000)}]\n", "aliases .* expand to more than"),
        ("seed: !!int x\n", "not valid YAML: invalid literal"),
        ("seed: !!float x\n", "not valid YAML"),
        ("seed: !!bool x\n", "not valid YAML"),
        ("seed: !!timestamp 5\n", "not valid YAML"),
        ("seed: !!binary x\n", "not valid YAML"),
        ("seed: 2024-99-99\n", "not valid YAML"),
        ('run_dir: "\\UFFFFFFFF"\n', "not valid YAML"),
        (f"seed: {'9' * 5000}\n", "line 1: a number of 5,000 characters"),
        (f"seed: {':'.join(['1'] * 5000)}\n", "line 1: a number of"),
        ("seed: " + "[" * 1500, "nested too deeply"),
        ("seed: a\0b\n", "not valid YAML"),
        ("? [a]\n: 1\n", "not valid YAML"),
        ("? {a: 1}\n: 1\n", "not valid YAML"),
        ("x" * 2**18 + "y", "larger than 262,144 bytes"),
        ("1: x\nb\u00a0c: 2\n", "1: "),
    ],
)
def test_hostile_yaml_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        _load(tmp_path, text)
    assert len(str(caught.value)) < 2000
    assert max(map(len, str(caught.value).splitlines())) < 600


def test_a_config_that_is_not_a_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path, "a\0b"):
        with pytest.raises(UserError, match="cannot be read"):
            load_config(path)


def test_long_and_many_mistakes_are_listed_shortly():
    with pytest.raises(UserError, match=r"and 960 more") as caught:
        parse_config({f"key {i}\n{'x' * 1000}": "y" * 1000 for i in range(996)} | {"run_dir": ["z" * 10**6]})
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("override", ["data.train.².path=x", "data.train.-1.path=x", f"data.train.{'9' * 5000}.path=x"])
def test_only_a_plain_number_is_an_index_of_a_list(tmp_path, override):
    with pytest.raises(UserError, match="expected an index from 0 to 0"):
        _load(tmp_path, MINIMAL, override)


def _numeric_fields(model=RunConfig, path=()):
    """(path of keys, example of the other values in it) of every field of the schema that takes a number."""
    for name, field in model.model_fields.items():
        yield from _numbers_in(field.annotation, (*path, name))


def _numbers_in(annotation, path):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _numeric_fields(annotation, path)
    elif annotation in (int, float):
        yield path
    elif typing.get_origin(annotation) is tuple:
        for inner in set(typing.get_args(annotation)) - {...}:
            yield from _numbers_in(inner, (*path, 0))
    elif typing.get_origin(annotation) is not Literal:
        for inner in typing.get_args(annotation):
            yield from _numbers_in(inner, path)


NUMERIC = sorted({".".join(map(str, path)) for path in _numeric_fields()})
FULL = changed(MINIMAL, data__eval=[{"path": "e"}], optim__betas=[0.9, 0.999])


def test_the_numeric_fields_are_found():
    assert {"seed", "lora.alpha", "data.train.0.weight", "optim.betas.0", "memory.recompute"} <= set(NUMERIC)
    assert len(NUMERIC) >= 28


@pytest.mark.parametrize("key", NUMERIC)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1.0e+300", str(10**23), "true", "-1", "'1e300'", "'inf'"])
def test_no_numeric_field_takes_an_impossible_value(tmp_path, key, value):
    base = changed(FULL, train={"epochs": 1}) if key == "train.epochs" else FULL
    if key.startswith("data.eval"):
        base = changed(base, data__eval=[{"path": "e", "hold_out": 1}])
    with pytest.raises(UserError, match=key.removesuffix(".0").replace(".", r"\.")) as caught:
        _load(tmp_path, base, f"{key}={value}")
    assert "unknown key" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_dir": ""}, "run_dir: expected a name or path, found none"),
        ({"run_dir": " "}, "run_dir: expected a name or path, found none"),
        ({"run_dir": "~no-such-user/x"}, "~no-such-user: there is no such user"),
        ({"data__cache_dir": "~no-such-user"}, r"data\.cache_dir: ~no-such-user: there is no such user"),
        ({"model__cache_4bit": "~no-such-user"}, "there is no such user"),
        ({"data__train": [{"path": "a\0b"}]}, r"data\.train\.0\.path: text cannot hold a NUL"),
        ({"data__train": [{"path": "a", "columns": {"input": "a\0"}}]}, "text cannot hold a NUL"),
        ({"run_dir": "a\0"}, "text cannot hold a NUL"),
        ({"logging__trackers": ["a\0"]}, "text cannot hold a NUL"),
        ({"optim__betas": [1.5, -2]}, r"betas\.0: expected a number >= 0 and < 1"),
        ({"strategy__timeout_seconds": 1e-9}, "timeout_seconds"),
        ({"data__row_tokens": 10**15}, "row_tokens"),
        ({"batch__rows_per_step": 10**11}, "rows_per_step"),
    ],
)
def test_values_that_nothing_can_use_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        parse_config(changed(MINIMAL, **changes))


def test_the_home_folder_is_expanded_in_run_dir(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_config(changed(MINIMAL, run_dir="~/runs/x")).run_dir == "/home/someone/runs/x"


@pytest.mark.parametrize("text", ["1234567e8", "1e5", "12:30", "null", "true", "2024-01-01", "a\u2028b", "é: #", "- x"])
def test_text_that_looks_like_something_else_survives_the_round_trip(tmp_path, text):
    config = parse_config(changed(MINIMAL, model__revision=text))
    assert _load(tmp_path, dump_yaml(config)) == config


def test_configs_are_frozen():
    config = parse_config(MINIMAL)
    with pytest.raises(Exception, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_every_field_is_documented():
    def fields(schema, path=""):
        for name, field in schema.get("properties", {}).items():
            yield f"{path}{name}", field

    schema = json_schema()
    json.dumps(schema)
    undocumented = [
        f"{section}.{name}"
        for section, definition in {"RunConfig": schema, **schema["$defs"]}.items()
        for name, field in fields(definition)
        if not field.get("description") and (section, name) not in {("ModelConfig", "name")}
    ]
    assert undocumented == []


def test_every_field_is_used_outside_the_config():
    from pathlib import Path

    import qlora_dist

    package = Path(qlora_dist.__file__).parent
    text = "\n".join(path.read_text() for path in package.rglob("*.py") if path.parent.name != "config")
    unused = [
        f"{section}.{name}"
        for section, field in RunConfig.model_fields.items()
        for name in _names(field.annotation)
        if f".{name}" not in text
    ]
    assert unused == []


def _names(annotation):
    if hasattr(annotation, "model_fields"):
        return list(annotation.model_fields)
    return [name for inner in getattr(annotation, "__args__", ()) for name in _names(inner)]
