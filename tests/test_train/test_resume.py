"""What a resume requires to be unchanged, which checkpoint it takes, and what it leaves behind."""

from __future__ import annotations

import errno
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny_run import config_of, losses_of, make_inputs, metrics_of, write_config
from safetensors.torch import load_file, save_file

from qlora_dist.commands import invoke
from qlora_dist.config.run_dir import RunDir
from qlora_dist.errors import RunFailed, UserError
from qlora_dist.files import write_manifest
from qlora_dist.model.weights import safetensors_files
from qlora_dist.train import source_digests, train
from qlora_dist.train.checkpoint import find_newest


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two steps of which each was saved, and all that it needs."""
    folder = tmp_path_factory.mktemp("begun") / "all"
    folder.mkdir()
    raw = make_inputs(folder, num_examples=16)
    train(config_of(raw, train__steps=2, train__save_every=1))
    return folder, raw


@pytest.fixture
def copied(begun, tmp_path):
    """(folder, plain config of two more steps) of a copy whose files may be changed."""
    folder, raw = begun
    shutil.copytree(folder, tmp_path / "all")
    moved = json.loads(json.dumps(raw).replace(str(folder), str(tmp_path / "all")))
    moved["train"] = {"steps": 4, "save_every": 1}
    _name_again(tmp_path / "all", folder)
    return tmp_path / "all", moved


def _name_again(folder: Path, before: Path) -> None:
    """Writes the new place of everything into config and checkpoints, which compare the names."""
    config = folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(before), str(folder)))
    for path in (folder / "run" / "checkpoints").iterdir():
        _rewrite(path, (path / "state.json").read_text().replace(str(before), str(folder)))


def test_a_run_goes_on_when_nothing_has_changed(copied):
    folder, raw = copied
    assert train(config_of(raw)).step == 4
    assert len(losses_of(folder / "run")) == 4
    recorded = json.loads((folder / "run" / "summary.json").read_text())["sources"]
    assert set(recorded["model.name"]) == {"config.json", "model.safetensors"}


def _moved(begun, tmp_path):
    """(folder, plain config of two more steps) of a run that was moved with its files, whose checkpoints name the old
    ones."""
    folder, raw = begun
    shutil.copytree(folder, tmp_path / "moved")
    moved = json.loads(json.dumps(raw).replace(str(folder), str(tmp_path / "moved")))
    moved["train"] = {"steps": 4, "save_every": 1}
    return tmp_path / "moved", moved


def test_a_run_that_was_moved_with_its_files_goes_on(begun, tmp_path, capsys):
    folder, raw = _moved(begun, tmp_path)
    assert train(config_of(raw)).step == 4
    assert capsys.readouterr().out.count("other paths than before, with the same content: model.name, data.train") == 1
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["model"]["name"] == str(folder / "model")
    assert train(config_of(raw)).step == 4 and "other paths" not in capsys.readouterr().out


def test_a_finished_run_that_was_moved_is_compared_before_it_is_called_finished(begun, tmp_path, capsys):
    folder, raw = _moved(begun, tmp_path)
    raw["train"]["steps"] = 2
    assert train(config_of(raw)).step == 2
    assert "other paths than before" in capsys.readouterr().out
    assert train(config_of(raw)).step == 2 and "this run is finished" in capsys.readouterr().out
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model" / "config.json").write_text("{}"), None),
        (lambda folder: shutil.copy(folder / "held_out.json", folder / "train.json"), "with other training data"),
    ],
    ids=["base", "data"],
)
def test_other_content_under_another_path_is_refused_and_the_run_keeps_its_config(begun, tmp_path, spoil, message):
    folder, raw = _moved(begun, tmp_path)
    spoil(folder)
    before = (folder / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=message):
        train(config_of(raw))
    assert (folder / "run" / "config.yaml").read_text() == before


def test_another_path_is_refused_where_the_checkpoint_does_not_tell_the_content(begun, tmp_path):
    folder, raw = _moved(begun, tmp_path)
    for path in (folder / "run" / "checkpoints").iterdir():  # of a version that did not record it
        state = json.loads((path / "state.json").read_text())
        del state["sources"]
        _rewrite(path, json.dumps(state))
    with pytest.raises(UserError, match=r"made with another config:\n  model\.name: was .*now"):
        train(config_of(raw))


def _rewrite(checkpoint: Path, state: str) -> None:
    (checkpoint / "state.json").write_text(state)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {"format": 1, "step": int(checkpoint.name.removeprefix("step-"))})


@pytest.mark.parametrize("limit", [2**28, 0])  # 0: weights are sampled, as large ones are
@pytest.mark.parametrize("which", ["all", "one norm"])
def test_other_weights_under_the_same_name_are_refused(copied, monkeypatch, limit, which):
    folder, raw = copied
    path = folder / "model" / "model.safetensors"
    monkeypatch.setattr(safetensors_files, "WHOLE_BYTES", limit)
    if limit == 0:  # made again with this limit
        raw["run_dir"] = str(folder / "again")
        train(config_of(raw, train__steps=1))
    weights, size = load_file(path), path.stat().st_size
    for name in weights if which == "all" else ["model.norm.weight"]:
        weights[name] = weights[name] + 0.5 * torch.randn_like(weights[name])
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == size
    with pytest.raises(UserError, match=r"other files behind the same names:\n  model.name: other content in model\.s"):
        train(config_of(raw))


def test_another_config_of_the_model_is_refused_but_not_its_version(copied):
    folder, raw = copied
    path = folder / "model" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "rms_norm_eps": 1e-3}))
    with pytest.raises(UserError, match=r"model\.name: other content in config\.json\nrestore"):
        train(config_of(raw))
    path.write_text(json.dumps({**content, "transformers_version": "9.9"}))
    assert train(config_of(raw, train__steps=3)).step == 3


def test_a_base_that_differs_in_memory_alone_is_refused(copied, monkeypatch):
    """A bit of a large file that no sample holds."""
    _, raw = copied
    from qlora_dist.train import setup_model

    monkeypatch.setattr(setup_model, "base_checksum", lambda _: "other")
    monkeypatch.setattr("qlora_dist.train.save_and_resume.base_checksum", lambda _: "other")
    with pytest.raises(UserError, match="other bits than the one that was trained on"):
        train(config_of(raw))


def test_other_held_out_data_are_refused_and_an_old_checkpoint_does_not_tell(copied):
    folder, raw = copied
    raw["data"]["eval"] = [{"path": str(folder / "held_out.json"), "format": "input-output"}]
    raw["run_dir"] = str(folder / "evaluated")
    train(config_of(raw, train__steps=1))
    records = json.loads((folder / "held_out.json").read_text())
    (folder / "held_out.json").write_text(json.dumps(records[1:]))
    with pytest.raises(UserError, match=r"other held-out data behind data\.eval.*another run_dir"):
        train(config_of(raw))
    shutil.copy(folder / "held_out.json", folder / "elsewhere.json")
    raw["data"]["eval"][0]["path"] = str(folder / "elsewhere.json")
    with pytest.raises(UserError, match=r"other held-out data behind data\.eval"):
        train(config_of(raw))
    raw["data"]["eval"][0]["path"] = str(folder / "held_out.json")
    checkpoint = folder / "evaluated" / "checkpoints" / "step-00000001"
    state = json.loads((checkpoint / "state.json").read_text())
    del state["eval_fingerprint"]
    _rewrite(checkpoint, json.dumps(state))
    assert train(config_of(raw, train__steps=2)).step == 2


def test_files_are_read_before_the_model_is_and_one_that_is_replaced_while_it_loads_is_noticed(copied, monkeypatch):
    folder, raw = copied
    from qlora_dist.train import setup_model

    load, adapter = setup_model.load_base, folder / "begin"
    raw |= {"lora": {**raw["lora"], "init_from": str(adapter)}, "run_dir": str(folder / "replaced")}
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"lora\.init_from .*begin: there is no file adapter_config\.json"),
    ):
        patch.setattr(setup_model, "load_base", lambda *_, **__: pytest.fail("the model was read first"))
        train(config_of(raw))
    shutil.copytree(folder / "run" / "adapter", adapter)

    def replace_and_load(*arguments, **options):
        config = adapter / "adapter_config.json"
        config.write_text(config.read_text() + "\n")
        return load(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(setup_model, "load_base", replace_and_load)
        train(config_of(raw, train__steps=1))
    with pytest.raises(UserError, match=r"lora\.init_from: other content in adapter_config\.json"):
        train(config_of(raw))


def test_each_field_that_names_files_is_compared(tmp_path, monkeypatch):
    raw = make_inputs(tmp_path, num_examples=4)
    adapter, ds_config = tmp_path / "adapter", tmp_path / "ds.json"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("a")
    ds_config.write_text("{}")
    config = config_of(raw, lora__init_from=str(adapter), strategy__ds_config=str(ds_config))
    before = source_digests.source_digests(config)
    assert source_digests.changed_sources(before, source_digests.source_digests(config)) == []
    assert source_digests.changed_sources({}, before) == []  # of a version that recorded nothing
    monkeypatch.chdir(tmp_path)
    as_given = {field.replace(f"{tmp_path}/", ""): digests for field, digests in before.items()}  # the same
    assert "strategy.ds_config ds.json" in as_given
    (adapter / "adapter_model.safetensors").write_text("b")
    ds_config.write_text("{ }")
    for saved in (before, as_given):
        assert source_digests.changed_sources(saved, source_digests.source_digests(config)) == [
            "  lora.init_from: other content in adapter_model.safetensors",
            f"  strategy.ds_config {ds_config}: other content in ds.json",
        ]


def test_weights_of_another_layout_are_refused_though_the_config_is_the_same(copied):
    """As another version would name or place them: states would be given to other weights of equal size."""
    folder, raw = copied
    for path in (folder / "run" / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        first, second, *rest = state["layout"][0]
        state["layout"][0] = [[second[0], *first[1:]], [first[0], *second[1:]], *rest]
        _rewrite(path, json.dumps(state))
    with pytest.raises(UserError, match="its trained weights have other names or shapes than this config's"):
        train(config_of(raw))


def test_a_branch_that_was_left_is_never_taken_again(copied, capsys):
    folder, raw = copied
    checkpoints = folder / "run" / "checkpoints"
    assert train(config_of(raw, train__steps=3), resume=str(checkpoints / "step-00000001")).step == 3
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["abandoned-step-00000002", *(f"step-{step:08d}" for step in (1, 2, 3))]
    # and when the start ends before it has saved
    with pytest.raises(RuntimeError, match="stop here"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_dist.train.train_step", _stop_here)
        train(config_of(raw), resume=str(checkpoints / "step-00000001"))
    assert RunDir(folder / "run").newest_step() == 1
    capsys.readouterr()
    assert train(config_of(raw)).step == 4
    assert "step-00000001 (step 1)" in capsys.readouterr().out


def _stop_here(*_, **__):
    raise RuntimeError("stop here")


def test_a_damaged_newest_one_is_set_aside_and_no_longer_counts(copied, capsys):
    folder, raw = copied
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "step-00000002" / "manifest.json").write_text('{"format": 1, "step": 2, "files": {}}')
    assert train(config_of(raw, train__steps=3, train__keep=1)).step == 3
    assert "rejected step-00000002: manifest.json does not list" in capsys.readouterr().out
    assert sorted(path.name for path in checkpoints.iterdir()) == ["rejected-step-00000002", "step-00000003"]
    assert find_newest(checkpoints) == (checkpoints / "step-00000003", [])


def test_what_cannot_be_used_at_all_stays_where_it_is(copied):
    folder, raw = copied
    checkpoints = folder / "run" / "checkpoints"
    for path in checkpoints.iterdir():
        (path / "manifest.json").write_text("[]")
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint can be used"):
            train(config_of(raw))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]


# --- disks and folders that fail while a run is at work ---------------------------------------------------------------


def _full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


class _FullDisk(io.StringIO):
    flush = _full


@pytest.mark.parametrize(
    ("place", "patched"),
    [
        ("config.yaml", {"qlora_dist.config.run_dir.write_text": _full}),
        ("the lock", {"qlora_dist.cluster.run_lock.RunLock.acquire": _full}),
        ("metrics.jsonl at the start", {"qlora_dist.train.metrics.write_text": _full}),
        ("a line of metrics.jsonl", {"qlora_dist.train.metrics.open": lambda *_, **__: _FullDisk()}),
        ("a checkpoint", {"qlora_dist.train.checkpoint.write_manifest": _full}),
        ("the adapter", {"qlora_dist.train.save_and_resume.export_trained": _full}),
        ("summary.json", {"qlora_dist.train.save_and_resume.write_json": _full}),
        ("completed", {"qlora_dist.config.run_dir.write_json": _full}),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_a_full_disk_is_one_paragraph_and_the_same_command_goes_on(copied, monkeypatch, capsys, caplog, place, patched):
    folder, raw = copied
    config = write_config(folder / "c.yaml", raw, train__steps=3)
    with monkeypatch.context() as patch:
        for name, value in patched.items():
            patch.setattr(name, value, raising=False)
        assert invoke(["train", str(config)]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "the same command" in said, said
    assert "Traceback" not in said + caplog.text and said.strip().count("\n") == 0
    assert invoke(["train", str(config)]) == 0
    assert len(losses_of(folder / "run")) == 3
    assert (folder / "run" / "completed").is_file() and (folder / "run" / "adapter").is_dir()
    assert json.loads((folder / "run" / "summary.json").read_text())["step"] == 3


def test_a_directory_that_is_removed_while_the_run_works_is_noticed_at_the_next_save(copied, monkeypatch, capsys):
    folder, raw = copied
    from qlora_dist import train as trainer

    step = trainer.train_step

    def remove_and_step(*arguments, **options):
        shutil.rmtree(folder / "run", ignore_errors=True)
        return step(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(RunFailed, match="was removed or replaced while this run"):
        patch.setattr(trainer, "train_step", remove_and_step)
        train(config_of(raw))
    assert train(config_of(raw, train__steps=2)).step == 2  # anew


def test_odd_files_in_the_directory_end_a_start_before_it_has_trained(copied, capsys):
    folder, raw = copied
    config = write_config(folder / "c.yaml", raw, train__steps=3)
    shutil.rmtree(folder / "run" / "adapter")
    (folder / "run" / "adapter").touch()
    assert invoke(["train", str(config)]) == 2
    assert "adapter is a file, where this run writes a folder; move it away" in capsys.readouterr().err
    (folder / "run" / "adapter").unlink()
    with open(folder / "run" / "metrics.jsonl", "r+b") as file:
        file.write(b"\xff\0")  # in the first line
    (folder / "run" / "completed").write_text("[]")
    (folder / "run" / "eval_start.json").write_text("[]")
    assert invoke(["train", str(config)]) == 0
    assert "damaged lines are left out (1)" in capsys.readouterr().out
    assert [line["step"] for line in metrics_of(folder / "run")] == [2, 3]
