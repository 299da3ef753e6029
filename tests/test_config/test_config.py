"""Every mistake in a config is found before anything runs and reported with its key."""

import json

import pytest
import yaml
from helpers.tiny_run import changed

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
        ({"optim__learning_rate": 1e-4}, r"optim\.learning_rate: unknown key; known keys: name, lr"),
        ({"optim__wieght_decay": 0.1}, r"optim\.wieght_decay: unknown key; did you mean weight_decay\?"),
        ({"modle": {"name": "x"}}, r"modle: unknown key; did you mean model\?"),
        (
            {"data__train": [{"path": "d", "fromat": "alpaca"}]},
            r"data\.train\.0\.fromat: unknown key; did you mean format",
        ),
        ({"data__train": []}, r"data\.train: expected at least one source \{path: \.\.\.\} \(found \[\]\)"),
        ({"train": {"steps": 3, "epochs": 1}}, "exactly one of train.steps and train.epochs"),
        ({"train": {}}, "exactly one of train.steps and train.epochs"),
        ({"lora__rank": 0}, r"lora\.rank: Input should be greater than or equal to 1 \(found 0\)"),
        ({"lora": None}, "quantized weights cannot be trained; set model.quantization=none"),
        ({"model__compute_dtype": "float16"}, "Input should be 'bfloat16' or 'float32'"),
        ({"model__quantization": "nf5"}, r"model\.quantization: Input should be 'nf4'"),
        ({"train__eval_every": 2}, "data.eval is empty"),
        ({"memory__recompute": -1}, r"recompute: expected auto, full, none or a number of layers >= 0 \(found -1\)"),
        ({"run_dir": None}, r"run_dir: Input should be a valid string \(found None\)"),
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
    )
    assert config.optim.lr == 3e-5
    assert config.lora is not None and config.lora.target_modules == ("q_proj", "v_proj")
    assert config.data.train[0].max_examples == 7
    assert config.model.double_quant is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "expected section.key=value"),
        ("data.train.3.path=x", "is a list of length 1; expected an index from 0 to 0"),
        ("run_dir.x=1", "run_dir is a value, not a section"),
        ("optim.lr=[1", "the value is not valid YAML"),
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
