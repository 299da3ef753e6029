"""Local paths are made absolute once, when a config is read; names of the hub stay names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_run import changed
from pydantic import BaseModel

from qlora_dist.config import RunConfig, dump_yaml, load_config, parse_config
from qlora_dist.config.changes import BY_CONTENT, config_changes, moved_paths
from qlora_dist.config.names import DATA_SUFFIXES
from qlora_dist.config.run_dir import RunDir
from qlora_dist.data.documents.select import select_documents
from qlora_dist.data.formats.readers import READERS
from qlora_dist.errors import UserError

RAW: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"name": "models/base", "cache_4bit": "~/four"},
    "lora": {"init_from": "../adapter"},
    "data": {
        "train": [{"path": "data/a.jsonl"}, {"path": "org/name"}, {"path": "wikitext"}],
        "eval": [{"path": "folder"}],
        "template": "own.jinja",
        "cache_dir": "./cache",
    },
    "strategy": {"name": "zero2", "ds_config": "ds.json"},
    "train": {"steps": 3},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a model and a folder of data; home is beside it."""
    for name in ("here/models/base", "here/folder", "home"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_each_local_path_becomes_absolute_and_each_name_stays(here):
    config = parse_config(RAW)
    assert config.run_dir == f"{here}/runs/x"
    assert (config.model.name, config.model.cache_4bit) == (f"{here}/models/base", f"{here.parent}/home/four")
    assert config.lora is not None and config.lora.init_from == f"{here}/../adapter"
    assert [source.path for source in config.data.train] == [f"{here}/data/a.jsonl", "org/name", "wikitext"]
    assert [source.path for source in config.data.eval] == [f"{here}/folder"]
    assert (config.data.template, config.data.cache_dir) == (f"{here}/own.jinja", f"{here}/cache")
    assert config.strategy.ds_config == f"{here}/ds.json"
    named = parse_config(changed(RAW, model__name="org/base", data__template="chatml"))
    assert (named.model.name, named.data.template) == ("org/base", "chatml")
    assert parse_config({k: v for k, v in RAW.items() if k != "data"} | {"data": {"train": RAW["data"]["train"]}}) == (
        config.model_copy(
            update={
                "data": config.data.model_copy(
                    update={"eval": (), "template": "auto", "cache_dir": f"{here.parent}/home/.cache/qlora_dist"}
                )
            }
        )
    )


def test_what_was_written_down_means_the_same_in_another_folder_and_for_another_user(here, tmp_path, monkeypatch):
    written = tmp_path / "config.yaml"
    config = parse_config(RAW)
    written.write_text(dump_yaml(config))
    monkeypatch.setenv("HOME", "/home/other")
    monkeypatch.chdir("/")
    assert load_config(written) == config
    assert config_changes(dump_yaml(config), written.read_text()) == []


def test_links_are_kept_but_do_not_make_two_configs_of_one(here):
    (here / "link").symlink_to(here / "models", target_is_directory=True)
    linked, direct = parse_config(changed(RAW, model__name="link/base")), parse_config(RAW)
    assert linked.model.name == f"{here}/link/base"
    assert (
        config_changes(dump_yaml(linked), dump_yaml(direct)) == moved_paths(dump_yaml(linked), dump_yaml(direct)) == []
    )


@pytest.mark.parametrize("key", ["run_dir", "model__name", "data__cache_dir", "lora__init_from"])
def test_an_unknown_user_and_a_working_directory_that_is_gone_are_said(here, key):
    with pytest.raises(UserError, match=r"~nobody-at-all: there is no such user; write \./~nobody-at-all/x"):
        parse_config(changed(RAW, **{key: "~nobody-at-all/x"}))
    (here / "gone").mkdir()
    os.chdir(here / "gone")
    (here / "gone").rmdir()
    with pytest.raises(UserError, match="the working directory was removed; start in another folder"):
        parse_config(changed(RAW, **{key: "./x"}))


def test_the_suffixes_that_make_a_name_a_path_are_those_that_are_read():
    assert set(READERS) == set(DATA_SUFFIXES)


def _texts(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Fields of plain text, with no fixed set of values."""
    found = set()
    for name, field in model.model_fields.items():
        annotations = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for one in annotations:
            if isinstance(one, type) and issubclass(one, BaseModel):
                found |= _texts(one, f"{prefix}{name}.")
        if str in annotations or any("Annotated[str" in str(one) for one in annotations):
            found.add(f"{prefix}{name}")
    return found


def test_each_field_of_text_is_one_that_is_made_absolute_or_names_no_file():
    """A new field of text must be put into one of the two sets."""
    no_files = {
        "model.revision", "data.date", "logging.project", "logging.trackers", "data.train.columns",
        *(f"data.{part}.{field}" for part in ("train", "eval") for field in
          ("split", "subset", "revision", "columns", "name")),
    }  # fmt: skip
    paths = {
        "run_dir", "model.name", "model.cache_4bit", "lora.init_from", "data.train.path", "data.eval.path",
        "data.template", "data.cache_dir", "strategy.ds_config",
    }  # fmt: skip
    assert _texts(RunConfig) - no_files == paths


# --- a run whose files have moved -------------------------------------------------------------------------------------


def test_an_old_run_with_relative_paths_is_the_same_run(here):
    config = dump_yaml(parse_config(RAW))
    old = config.replace(f"{here}/", "").replace(f"{here.parent}/home/", "~/")
    assert "path: data/a.jsonl" in old and str(here) not in old
    assert config_changes(old, config) == moved_paths(old, config) == []


def test_another_path_alone_is_left_to_the_content_where_a_checkpoint_tells_it(here):
    old, new = (dump_yaml(parse_config(changed(RAW, model__name=name))) for name in ("./models/base", "./other"))
    assert moved_paths(old, new) == ["model.name"]
    assert config_changes(old, new) == [f"  model.name: was '{here}/models/base', now '{here}/other'"]
    assert config_changes(old, new, by_content=BY_CONTENT) == []
    run = RunDir(here / "run")
    run.open(old)
    run.begin()
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"different config:\n  model\.name"):
        run.open(new)
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    (run.checkpoints / "step-00000001" / "manifest.json").touch()
    run.mark_completed(1, {"steps": 1})
    run.open(new)
    assert run.config.read_text() == old and run.completed_steps({"steps": 1}) is None
    run.begin()
    assert run.config.read_text() == new and run.completed_steps({"steps": 1}) == 1


def test_the_records_that_are_held_out_do_not_depend_on_where_the_file_lies(here, monkeypatch):
    raw = changed(RAW, data__train=[{"path": "data/a.jsonl", "hold_out": 5}])
    drawn = []
    for folder in (here, here / "folder"):
        monkeypatch.chdir(folder)
        source = parse_config(raw).data.train[0].model_copy(update={"part": "train"})
        of = np.arange(50)
        drawn.append(select_documents([source], [50], np.zeros(50, dtype=np.int64), of, 0).tolist())
    assert drawn[0] == drawn[1] and len(drawn[0]) == 45
    again = load_config_of(here, parse_config(raw)).data.train[0]
    assert again.name == "data/a.jsonl" and again.path == f"{here}/folder/data/a.jsonl"


def load_config_of(folder: Path, config: RunConfig) -> RunConfig:
    (folder / "written.yaml").write_text(dump_yaml(config))
    return load_config(folder / "written.yaml")


def test_another_name_on_the_hub_and_another_setting_of_a_source_are_changes(here):
    for change in ({"model__name": "org/a"}, {"data__train": [{"path": "./x.json", "split": "train"}]}):
        changes = config_changes(
            dump_yaml(parse_config(RAW)), dump_yaml(parse_config(changed(RAW, **change))), by_content=BY_CONTENT
        )
        assert len(changes) == 1


def test_a_relative_path_as_given_on_the_command_line_is_one_of_the_working_directory(here):
    path = here / "c.yaml"
    path.write_text(dump_yaml(parse_config(RAW)))
    assert load_config(path, ("run_dir=elsewhere",)).run_dir == str(Path.cwd() / "elsewhere")
