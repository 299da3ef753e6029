"""A JSON file from outside: of any form it gives its content, or one error that names it, and never waits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_dist.config.json_file import read_json, read_json_object
from qlora_dist.config.model_json import read_model_json
from qlora_dist.config.run_dir import RunDir
from qlora_dist.errors import UserError
from qlora_dist.model.lora_files import read_adapter_config
from qlora_dist.model.weights.sources import open_files
from qlora_dist.optim.deepspeed_config import fill_ds_config
from qlora_dist.train.evaluation import _kept_values
from qlora_dist.train.prompt_format import PromptFormat

FORMS = {
    "absent": (None, "No such file"),
    "empty": (b"", "not valid JSON"),
    "cut short": (b'{"a": ', "not valid JSON"),
    "no text": (b'{"a": "\xff"}', "not valid JSON: .*utf-8"),
    "deep": (b'{"a":' + b"[" * 200_000, "not valid JSON"),
    "a huge number": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: .*digits"),
    "a list": (b'[{"a": 1}]', r"is not a JSON object: found \[\{'a': 1\}\]"),
    "a number": (b"3", "is not a JSON object: found 3"),
    "a folder": (os.mkdir, "not a regular file"),
    "a pipe": (os.mkfifo, "not a regular file"),
}


def _make(path: Path, form: str) -> str:
    made, message = FORMS[form]
    if callable(made):
        made(path)
    elif isinstance(made, bytes):
        path.write_bytes(made)
    return message


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_any_form_is_one_error_that_names_it(form, tmp_path):
    path = tmp_path / "x.json"
    message = _make(path, form)
    with pytest.raises(UserError, match=message) as found:
        read_json_object(path, f"setting {path}", "give another")
    text = str(found.value)
    assert text.startswith(f"setting {path} ") and text.endswith("; give another") and len(text) < 500


def test_what_is_no_object_is_read_where_anything_may_stand(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    assert read_json(tmp_path / "x.json", "x") == [1]


def _index(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    open_files(str(folder))


# by the name of the file: what reads it in a folder
READERS = {
    "config.json": lambda folder: read_model_json("m", folder / "config.json"),
    "adapter_config.json": read_adapter_config,
    "ds.json": lambda folder: fill_ds_config(
        folder / "ds.json", strategy="zero2", rows_per_step=1, micro_rows=1, accumulation=1, max_grad_norm=None
    ),
    "prompt_format.json": PromptFormat.read,
    "model.safetensors.index.json": _index,
}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "absent"])
@pytest.mark.parametrize("name", READERS)
def test_each_reader_of_a_users_file_refuses_it_by_name(name, form, tmp_path):
    _make(tmp_path / name, form)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        READERS[name](tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_the_run_that_only_saves_work_counts_as_absent(form, tmp_path):
    _make(tmp_path / "completed", form)
    _make(tmp_path / "eval_start.json", form)
    assert RunDir(tmp_path).completed_steps({"steps": 1}) is None
    assert _kept_values(tmp_path / "eval_start.json") == {}
