"""Mistakes that a config alone gives away are said before torch is imported: that takes seconds on some machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_python
from helpers.tiny_run import changed, config_of, make_inputs

from qlora_dist.cluster import device
from qlora_dist.commands.preflight import check_train
from qlora_dist.config import dump_yaml
from qlora_dist.config.run_dir import RunDir
from qlora_dist.errors import UserError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


def _refused(raw: dict[str, Any], resume: str = "auto", fresh: bool = False, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_train(config_of(raw, **changes), resume, fresh, is_main=True)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__train": [{"path": "./no.json"}]}, "no.json: no such file or folder"),
        ({"data__eval": [{"path": "./no.json"}]}, "no.json: no such file or folder"),
        ({"data__template": "./chat.jinja"}, "data.template: there is no file /"),
        ({"model__name": "./no"}, "there is no such folder"),
        ({"lora__target_modules": ["q_prj"]}, "q_prj matches no linear layer; available: down_proj"),
        ({"lora__init_from": "./no"}, "no/adapter_config.json; give the folder of a PEFT adapter"),
        ({"strategy__name": "zero2", "strategy__ds_config": "./no.json"}, "strategy.ds_config: there is no file /"),
        ({"logging__trackers": ["carrier_pigeon"]}, "expected some of tensorboard"),
        ({"device": "cpu", "model__attention": "flash"}, "it needs a CUDA device, and this run has none"),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(raw, changes, expected):
    assert expected in _refused(raw, **changes)


def test_nothing_is_refused_that_is_right_and_nothing_is_written(raw):
    check_train(config_of(raw), "auto", fresh=False, is_main=True)
    check_train(config_of(raw), "never", fresh=True, is_main=True)
    assert not Path(raw["run_dir"]).exists()


def test_a_resume_without_a_checkpoint_and_one_that_contradicts_fresh_are_refused(raw, tmp_path):
    assert "there is no checkpoint in /" in _refused(raw, "atuo")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "manifest.json").touch()
    check_train(config_of(raw), str(tmp_path / "c"), fresh=False, is_main=True)
    assert "give one of the two" in _refused(raw, str(tmp_path / "c"), fresh=True)


def test_a_run_of_another_config_is_refused_by_rank_0_alone_unless_it_is_set_aside(raw):
    run = RunDir(Path(raw["run_dir"]))
    run.open(dump_yaml(config_of(raw, data__date="2024-07-06")))
    run.begin()
    run.metrics.write_text('{"step": 1}\n')
    before = {path: path.stat().st_mtime_ns for path in run.path.iterdir()}
    check_train(config_of(raw), "auto", fresh=False, is_main=True)  # with the day on which that run began
    assert "lora.rank: was 4, now 2" in _refused(raw, lora__rank=2)
    check_train(config_of(raw, lora__rank=2), "auto", fresh=False, is_main=False)
    check_train(config_of(raw, lora__rank=2), "auto", fresh=True, is_main=True)
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    assert "--resume never, but" in _refused(raw, "never")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_run_is_known_without_its_ranks(raw, tmp_path, capsys):
    from qlora_dist.commands import invoke

    run = RunDir(Path(raw["run_dir"]))
    run.open(dump_yaml(config_of(raw, data__date="2024-07-06")))
    run.begin()
    (tmp_path / "c.yaml").write_text(dump_yaml(config_of(raw)))
    assert check_train(config_of(raw), "auto", fresh=False, is_main=True) is None
    run.completed.write_text(json.dumps({"step": 5, "length": config_of(raw).train.length}))
    assert invoke(["train", str(tmp_path / "c.yaml"), "--ranks", "2"]) == 0
    assert "this run is finished (5 steps, see " in capsys.readouterr().out
    assert check_train(config_of(raw), "auto", fresh=True, is_main=True) is None
    assert check_train(config_of(raw, train__steps=6), "auto", fresh=False, is_main=True) is None


def test_who_calls_train_itself_is_refused_too(raw):
    from qlora_dist.train import train

    run = RunDir(Path(raw["run_dir"]))
    run.open(dump_yaml(config_of(raw, data__date="2024-07-06")))
    run.begin()
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="--resume never, but"):
        train(config_of(raw), "never")
    with pytest.raises(UserError, match="device is cuda, but"):
        train(config_of(raw, device="cuda"))
    with pytest.raises(UserError, match="expected some of tensorboard"):
        train(config_of(raw, logging__trackers=["carrier_pigeon"]))


def test_a_run_directory_below_a_file_is_refused(raw, tmp_path):
    (tmp_path / "file").touch()
    assert "file is not a folder" in _refused(raw, run_dir=str(tmp_path / "file" / "run"))


def test_a_tokenizer_of_another_model_is_refused_but_not_tokens_that_were_added(raw, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(raw["model"]["name"]).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    raw = changed(raw, model__name=str(model))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": "<new>"})
    path.write_text(json.dumps(content))
    check_train(config_of(raw), "auto", fresh=False, is_main=True)
    content["model"]["vocab"]["other"] = 5000
    path.write_text(json.dumps(content))
    assert "the tokenizer has tokens up to 5,000, but the model's embedding has 128 rows" in _refused(raw)


def test_without_a_gpu_a_run_that_asks_for_one_is_refused_with_the_reason(raw, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "no GPU for this run: CUDA_VISIBLE_DEVICES is ''" in _refused(raw, device="cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(device.importlib.metadata, "version", lambda _: "2.11.0+cu128")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: None)
    check_train(config_of(raw, device="cuda"), "auto", fresh=False, is_main=True)


def test_no_heavy_library_is_imported_for_it(raw, tmp_path):
    """Neither for the help of a command, nor for a mistake."""
    config = tmp_path / "c.yaml"
    config.write_text(dump_yaml(config_of(raw)))
    run_python(
        f"""
        import sys
        from qlora_dist.commands import invoke

        codes = [
            invoke(["train", "--help"]),
            invoke(["schema"]),
            invoke(["train", {str(config)!r}, "--set", "lora.target_modules=[q_prj]"]),
            invoke(["train", {str(config)!r}, "--set", "max_seq_length=8"]),
            invoke(["data", {str(config)!r}, "--set", "data.train.0.path=./no.json"]),
            invoke(["verify", {str(config)!r}, "--set", "data.train.0.path=./no.json"]),
        ]
        assert codes == [0, 0, 2, 2, 2, 2], codes
        heavy = {{"torch", "transformers", "bitsandbytes", "accelerate", "peft", "datasets"}} & set(sys.modules)
        assert not heavy, heavy
        """
    )
