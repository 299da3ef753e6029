"""A run directory goes on with its run, refuses what it must not overwrite, and is blocked by nothing that is left."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import yaml

from qlora_dist.config import RunConfig, changes, dump_yaml, parse_config, run_dir
from qlora_dist.config.changes import config_changes
from qlora_dist.config.run_dir import RunDir, num_damaged_metrics, read_metrics
from qlora_dist.config.sections import TrainConfig
from qlora_dist.errors import MachineFailed, RunFailed, UserError


def _text(**train: object) -> str:
    raw = {"run_dir": "run", "model": {"name": "base"}, "data": {"train": [{"path": "d.json"}]}}
    return dump_yaml(parse_config({**raw, "train": {"steps": 5, **train}}))


def _begun(path: Path, text: str = "") -> RunDir:
    run = RunDir(path)
    run.open(text or _text())
    run.begin()
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    return run


# --- what a start leaves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        ".config.yaml.123",
        ".write-test-123",
        ".seen-0a1b",
        ".lock.77",
        ".metrics.jsonl.9.tmp",
        ".report.html.0a1b",
        ".snapshot",
    ],
)
def test_a_start_that_was_killed_at_once_blocks_no_later_one(tmp_path, name):
    run = RunDir(tmp_path / "run")
    run.make()
    (run.path / name).touch()
    run.open(_text())
    assert (run.path / name).exists() is (name == ".snapshot")  # another's stays


def test_results_that_were_half_written_are_removed(tmp_path):
    run = _begun(tmp_path / "run")
    half = run.path / ".adapter.incomplete-0a1b"
    half.mkdir()
    (half / "x").touch()
    run.open(_text())
    assert not half.exists()


def test_a_directory_in_which_no_start_saved_anything_is_new(tmp_path):
    run = RunDir(tmp_path / "run")
    run.open(_text(steps=7))
    run.begin()
    for file in (run.metrics, run.history, run.report):
        file.touch()
    run.checkpoints.mkdir()
    run.open(_text(steps=8))
    run.begin()
    assert yaml.safe_load(run.config.read_text())["train"]["steps"] == 8
    run.config.unlink()
    run.open(_text(steps=9))


def test_a_start_that_is_refused_leaves_nothing(tmp_path):
    run = RunDir(tmp_path / "run")
    run.open(_text())
    assert [*run.path.iterdir()] == []
    run.discard()
    assert not run.path.exists()

    run.path.mkdir()  # the user's own
    run = RunDir(run.path)
    run.open(_text())
    run.discard()
    assert run.path.is_dir()


def test_a_start_that_is_refused_keeps_the_config_of_the_run(tmp_path):
    run = _begun(tmp_path / "run")
    before = run.config.read_text()
    RunDir(run.path).open(_text(save_every=2))
    assert run.config.read_text() == before


def test_a_run_is_set_aside_whole_and_stays_one(tmp_path, monkeypatch):
    run = _begun(tmp_path / "run", _text(steps=7))
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    run.lock.touch()
    monkeypatch.setattr(run_dir.time, "strftime", lambda _: "2030-01-02-030405")
    aside = run.set_aside()
    assert aside == tmp_path / "run.2030-01-02-030405"
    assert [*run.path.iterdir()] == [run.lock]  # held by this start
    with pytest.raises(UserError, match=r"train\.steps: was 7, now 8"):
        RunDir(aside).open(_text(steps=8))
    assert run.set_aside() is None
    run.open(_text(steps=8))
    run.begin()
    run.metrics.write_text("{}\n")
    assert run.set_aside() == tmp_path / "run.2030-01-02-030405-2"


def test_what_is_no_run_is_not_set_aside(tmp_path):
    run = RunDir(tmp_path / "run")
    (run.path / "adapter").mkdir(parents=True)
    with pytest.raises(UserError, match="is not empty but holds no run"):
        run.set_aside()
    assert run.adapter.is_dir()


@pytest.mark.parametrize(
    "made", ["metrics.jsonl", "checkpoints/step-00000001/x", "checkpoints/rejected-step-00000001/x", "adapter/x",
             "model/x", "completed"],
)  # fmt: skip
def test_a_config_of_a_run_that_saved_anything_is_not_replaced(tmp_path, made):
    run = RunDir(tmp_path / "run")
    run.open(_text(steps=7))
    run.begin()
    (run.path / made).parent.mkdir(parents=True, exist_ok=True)
    (run.path / made).write_text("{}\n")
    with pytest.raises(UserError, match=r"different config:\n  train\.steps: was 7, now 8\nrestore"):
        run.open(_text(steps=8))


def test_a_config_that_was_written_by_hand_is_not_replaced(tmp_path):
    run = RunDir(tmp_path / "run")
    run.make()
    run.config.write_text("# my settings\n" + _text(steps=7))
    with pytest.raises(UserError, match="different config"):
        run.open(_text(steps=8))


# --- train.eval_rows --------------------------------------------------------------------------------------------------


def _start(run: RunDir, **train: object) -> int | str:
    """train.eval_rows of a start with this section, as `train` opens the directory."""
    section = TrainConfig.model_validate({"steps": 5, **train})
    eval_rows = run.eval_rows(section)
    run.open(_text(**{**train, "eval_rows": eval_rows}))
    run.begin()
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    return eval_rows


def test_a_run_keeps_its_number_of_evaluated_rows_when_a_start_leaves_it_out(tmp_path):
    run = RunDir(tmp_path / "run")
    assert _start(run, eval_rows=16) == 16 == _start(run)
    assert yaml.safe_load(run.config.read_text())["train"]["eval_rows"] == 16
    with pytest.raises(UserError, match=r"train\.eval_rows: was 16, now 17"):
        _start(run, eval_rows=17)


def test_a_run_of_before_there_was_a_number_goes_on_with_all_rows(tmp_path):
    run = _begun(tmp_path / "run")
    old = yaml.safe_load(_text())
    del old["train"]["eval_rows"]
    run.config.write_text(yaml.safe_dump(old, sort_keys=False))
    with pytest.raises(UserError, match=r"train\.eval_rows: was 'all', now 256"):
        _start(run, eval_rows=256)
    assert _start(run) == "all" == _start(run)
    assert yaml.safe_load(run.config.read_text())["train"]["eval_rows"] == "all"


def test_a_start_that_saved_nothing_binds_no_number_of_rows(tmp_path):
    run = RunDir(tmp_path / "run")
    assert _start(run, eval_rows=16) == 16
    run.metrics.unlink()
    assert _start(run) == 256


def test_a_config_that_was_written_by_hand_without_the_number_has_the_default(tmp_path):
    run = RunDir(tmp_path / "run")
    run.make()
    run.config.write_text("# my settings\n" + _text().replace("  eval_rows: 256\n", ""))
    assert _start(run) == 256


# --- a config of another version --------------------------------------------------------------------------------------


class _NewTrainConfig(TrainConfig):
    patience: int | None = 3


class _NewRunConfig(RunConfig):
    train: _NewTrainConfig
    color: tuple[str, ...] = ("red",)


def test_a_new_field_with_its_default_does_not_block_an_old_run(monkeypatch):
    old = _text()
    monkeypatch.setattr(changes, "RunConfig", _NewRunConfig)
    raw = yaml.safe_load(old)

    def new(**fields: object) -> str:
        return yaml.safe_dump({**raw, "train": {**raw["train"], **fields}, "color": ["red"]})

    assert config_changes(old, new(patience=3)) == []
    assert config_changes(old, new(patience=4)) == ["  train.patience: was 3, now 4"]
    assert config_changes(new(patience=4), old) == ["  train.patience: was 4, now 3"]


def test_a_field_within_a_source_counts_as_well(monkeypatch):
    old, new = _text(), yaml.safe_load(_text())
    del new["data"]["train"][0]["weight"], new["optim"]
    assert config_changes(yaml.safe_dump(new), old) == config_changes(old, yaml.safe_dump(new)) == []
    new["data"]["train"][0]["weight"] = 2.0
    assert config_changes(yaml.safe_dump(new), old) == ["  data.train.0.weight: was 2.0, now 1.0"]


def _leaves(node: object, at: tuple = ()) -> list[tuple]:
    """The places of all values, those of sources among them."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if node and isinstance(node, list) else ()
    if isinstance(node, list) and not any(isinstance(one, dict) for one in node):
        return [at]
    return [leaf for key, inner in items for leaf in _leaves(inner, (*at, key))] or [at]


FREE = """run_dir device model.cache_4bit model.attention model.kernels data.require_eos data.num_workers data.cache_dir
    batch.micro_rows train.eval_every train.longest_first train.save_every train.keep memory.recompute
    memory.offload_activations strategy.name strategy.ds_config strategy.offload strategy.mixed_devices
    strategy.shard_over strategy.timeout_seconds logging.trackers logging.project"""


def test_only_what_changes_no_result_may_differ_between_two_starts():
    """Whoever adds a field decides here what it is."""
    places, free = _leaves(yaml.safe_load(_text())), []
    for *sections, last in places:
        other = yaml.safe_load(_text())
        node = other
        for key in sections:
            node = node[key]
        node[last] = "other"
        if not config_changes(yaml.safe_dump(other), _text()):
            free.append(".".join(map(str, (*sections, last))))
    assert len(places) > 60 and set(free) == set(FREE.split())


def test_a_free_field_frees_itself_and_what_is_below_it_alone():
    changed = _text(steps=6)
    assert len(config_changes(_text(), changed)) == len(config_changes(_text(), changed, ("train.step",))) == 1
    assert config_changes(_text(), changed, ("train.steps",)) == config_changes(_text(), changed, ("train",)) == []


def test_a_field_that_is_gone_and_a_value_that_is_no_longer_taken_are_named_unless_free():
    old = yaml.safe_load(_text())
    old["optim"] |= {"momentum": 0.9, "betas": [2.0, "x"]}
    old["model"]["quantization"] = "nf5"
    old["data"]["train"][0]["color"] = "red"
    del old["memory"]  # and a field that it lacks is still no change
    assert config_changes(yaml.safe_dump(old), _text()) == [
        "  data.train.0.color: was 'red', now None",
        "  model.quantization: was 'nf5', now 'nf4'",
        "  optim.betas: was [2.0, 'x'], now [0.9, 0.999]",
        "  optim.momentum: was 0.9, now None",
    ]
    old = yaml.safe_load(_text())
    old["strategy"] |= {"timeout_seconds": -1, "gone": 5}
    assert config_changes(yaml.safe_dump(old), _text()) == []


# --- odd files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", "{", "\0", "a: !!int x", "a: !!timestamp 5", "a: 2024-99-99", "[" * 5000, "\ud800", "&a [*a]",
     "&a {b: *a}"],
    ids=range(12),
)  # fmt: skip
def test_a_damaged_config_is_named_with_its_remedy(tmp_path, text):
    run = _begun(tmp_path / "run")
    run.config.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(UserError, match=r"run/config\.yaml is damaged: .*it may be deleted"):
        run.open(_text())


def test_a_config_that_is_gone_is_that_of_the_newest_checkpoint(tmp_path):
    run = _begun(tmp_path / "run")
    for step, text in ((1, json.dumps({"config": _text()})), (2, "[]")):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        (run.checkpoints / f"step-{step:08d}" / "state.json").write_text(text)
    run.config.unlink()
    with pytest.raises(UserError, match="different config"):
        run.open(_text(steps=9))
    run.open(_text())
    run.begin()
    assert run.config.is_file()


@pytest.mark.parametrize("name", ["adapter", "model", "checkpoints", "tensorboard"])
def test_a_file_where_a_folder_is_written_is_found_at_the_start(tmp_path, name):
    run = _begun(tmp_path / "run")
    (run.path / name).touch()
    with pytest.raises(UserError, match=rf"run/{name} is a file, where this run writes a folder; move it away"):
        run.open(_text())


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "completed", "eval_start.json"])
def test_a_folder_where_a_file_is_written_is_found_at_the_start(tmp_path, name):
    run = RunDir(tmp_path / "run")
    (run.path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"run/{name} is a folder, where this run writes a file; move it away"):
        run.open(_text())


def test_results_are_not_written_through_a_link_but_checkpoints_may_be_elsewhere(tmp_path):
    run, other = RunDir(tmp_path / "run"), tmp_path / "other"
    other.mkdir()
    run.make()
    run.checkpoints.symlink_to(other)
    run.open(_text())
    run.adapter.symlink_to(other)
    with pytest.raises(UserError, match="adapter is a symbolic link"):
        run.open(_text())


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "{", "{}", '{"step": "x", "length": {"steps": 5}}', "[" * 100_000, '{"step": 5}']
)
def test_a_damaged_mark_of_completion_means_that_the_results_are_written_again(tmp_path, text):
    run = _begun(tmp_path / "run")
    run.mark_completed(5, {"steps": 5})
    assert run.completed_steps({"steps": 5}) == 5 and run.completed_steps({"steps": 6}) is None
    run.completed.write_text(text)
    assert run.completed_steps({"steps": 5}) is None


def test_damaged_lines_of_metrics_are_skipped_and_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    damaged = [
        b"\0\0",
        b"\xff",
        b"[1]",
        b'{"loss": 1}',
        b'{"step": "2"}',
        b"[" * 100_000,
        b"9" * 5000,
        b'{"step": 3, "l',
    ]
    file.write_bytes(b'{"step": 1}\n' + b"\n".join(damaged) + b'\n{"step": 9}\n{"step": 10, "lo')
    assert [line["step"] for line in read_metrics(file)] == [1, 9]
    assert num_damaged_metrics(file) == len(damaged)  # the last line is that of a crash


def test_a_directory_that_was_removed_is_noticed(tmp_path):
    run = _begun(tmp_path / "run")
    run.require_present()
    run.config.unlink()
    with pytest.raises(RunFailed, match="was removed or replaced while this run was using it"):
        run.require_present()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_the_start_is_no_mistake_of_the_user(tmp_path, monkeypatch, number):
    run = RunDir(tmp_path / "run")

    def fail(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "write_text", fail)
        run.open(_text())
        with pytest.raises(MachineFailed, match=r"run: config\.yaml cannot be written: .*Checkpoints are intact"):
            run.begin()
        patch.setattr(Path, "touch", fail)
        with pytest.raises(MachineFailed, match="run: cannot be written: "):
            run.open(_text())
    run.open(_text())


def test_only_names_of_checkpoints_count_as_steps(tmp_path):
    run = RunDir(tmp_path)
    for name in (
        "step-00000004",
        "rejected-step-00000009",
        "abandoned-step-00000009",
        "step-²²²²²²²²",
        "step-9",
        "step-x",
    ):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "manifest.json").touch()
    assert run.newest_step() == 4
