"""A checkpoint is whole or not there, and what is damaged is never used."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_forked
from safetensors import SafetensorError
from safetensors.torch import save_file

from qlora_dist.errors import MachineFailed, RunFailed, UserError
from qlora_dist.files import DamagedFolder, write_manifest
from qlora_dist.train import checkpoint
from qlora_dist.train.checkpoint import (
    find_newest,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)

FILES = ["adapter_model.safetensors", "optimizer.safetensors", "state.json"]


def _save(folder: Path, step: int, keep: int = 3, size: int = 1000) -> Path:
    weights = {"w": torch.full((size,), float(step))}

    def write_weights(aside: Path) -> None:
        save_file(weights, aside / "adapter_model.safetensors")
        (aside / "adapter_config.json").write_text("{}")

    return save_checkpoint(
        folder,
        step,
        write_weights=write_weights,
        optimizer_tensors={"0.exp_avg": torch.full((size,), step + 0.5), "0.exp_avg_sq": torch.zeros(size)},
        state={
            "num_tokens": 10 * step,
            "num_labels": step,
            "config": "run_dir: run",
            "data_fingerprint": "f",
            "layout": [],
            "optimizer_numbers": {"0.step": step},
        },
        keep=keep,
    )


def test_what_was_saved_is_loaded(tmp_path):
    path = _save(tmp_path, 7)
    verify_checkpoint(path)
    loaded = load_checkpoint(path)
    assert loaded.state["step"] == 7 and loaded.state["num_tokens"] == 70
    assert torch.equal(loaded.optimizer_tensors["0.exp_avg"], torch.full((1000,), 7.5))


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "flip"])
def test_every_damage_of_every_file_is_found_and_the_one_before_is_taken(tmp_path, file, damage):
    older, newest = _save(tmp_path, 1), _save(tmp_path, 2)
    target = newest / file
    content = bytearray(target.read_bytes())
    if damage == "delete":
        target.unlink()
    elif damage == "flip":
        content[len(content) * 2 // 3] ^= 1
        target.write_bytes(content)
    else:
        target.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    found, rejected = find_newest(tmp_path)
    assert found == older
    assert [path for path, _ in rejected] == [newest]
    assert file in rejected[0][1] or file == "manifest.json"


def test_each_kind_of_damage_has_its_own_reason(tmp_path):
    path = _save(tmp_path, 1)
    (path / "state.json").write_text("{}")
    with pytest.raises(DamagedFolder, match=r"state\.json has 2 bytes, \d+ were written"):
        verify_checkpoint(path)
    (path / "state.json").unlink()
    with pytest.raises(DamagedFolder, match=r"state\.json is missing"):
        verify_checkpoint(path)
    (path / "manifest.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(DamagedFolder, match="format 99, this version reads 1"):
        verify_checkpoint(path)


KILL = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/test_train")
import test_checkpoint
from qlora_dist import files
from qlora_dist.train import checkpoint

os.fsync = lambda _: None  # slow, and a kill is no power failure

def save(folder, moment):
    "Writes the second checkpoint over the first, and is killed at this moment; the number of moments."
    count = 0
    def at_each(function):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return wrapped
    for module, name in ((checkpoint, "save_file"), (checkpoint, "write_json"), (checkpoint, "write_manifest"),
                         (files, "_sync"), (files, "sha256"), (os, "rename"), (os, "unlink"), (os, "rmdir")):
        setattr(module, name, at_each(getattr(module, name)))
    test_checkpoint._save(folder, 2, keep=1)
    return count

def at(moment):
    "How a process ends that is killed at this moment: the number of moments, or -9."
    test_checkpoint._save(Path(sys.argv[1]) / str(moment), 1, keep=1)
    child = os.fork()
    if not child:
        os._exit(save(Path(sys.argv[1]) / str(moment), moment))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

print(at(0), *(at(moment) for moment in range(1, at(-1) + 1)))
"""


def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    done = run_forked(KILL, str(tmp_path))
    assert done.returncode == 0, done.stderr
    num_moments, *ends = map(int, done.stdout.split())
    assert num_moments >= 16 and ends == [-signal.SIGKILL] * num_moments
    for moment in range(1, num_moments + 1):
        folder = tmp_path / str(moment)
        found, rejected = find_newest(folder)
        assert found is not None and rejected == [], moment
        for path in folder.glob("step-*"):  # also the one that was being deleted
            verify_checkpoint(path)
        assert load_checkpoint(found).state["step"] in (1, 2)
        _save(folder, 3, keep=1)  # and the run goes on
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000003"]


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_then_the_name(tmp_path, monkeypatch):
    events = []
    sync, rename = os.fsync, os.rename

    def synced(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", path.name if path.parent == tmp_path else path.relative_to(tmp_path.parent).name))
        sync(descriptor)

    def renamed(source, target):
        events.append(("rename", Path(source).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    path = _save(tmp_path, 1)
    ((place, (_, aside)),) = [(i, event) for i, event in enumerate(events) if event[0] == "rename"]
    before, after = ([name for kind, name in part if kind == "sync"] for part in (events[:place], events[place + 1 :]))
    assert {file.name for file in path.iterdir()} | {aside} <= set(before)
    assert after == [tmp_path.name]


def test_a_save_needs_three_times_the_states_and_not_a_byte_more(tmp_path, monkeypatch):
    usage, needed = checkpoint.shutil.disk_usage(tmp_path), 3 * 2 * 4000 + 2**20
    for free in (needed, needed - 1):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if free == needed:
            assert _save(tmp_path, 1).is_dir()
        else:
            with pytest.raises(MachineFailed, match="MiB may be needed"):
                _save(tmp_path, 2)


def test_another_checkpoint_of_the_step_that_a_run_goes_on_from_is_left_behind_too(tmp_path):
    chosen = _save(tmp_path / "elsewhere", 2)
    for step in (1, 2, 3):
        _save(tmp_path / "run", step)
    checkpoint.set_aside_newer(tmp_path / "run", chosen, 2, {"step-00000003": "damaged"})
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["abandoned-step-00000002", "rejected-step-00000003", "step-00000001"]


def _listed(path: Path, manifest: dict) -> None:
    """Lists a checkpoint's files again, as if what they hold now had been written."""
    (path / "manifest.json").unlink()
    write_manifest(path, {key: value for key, value in manifest.items() if key != "files"})


def test_what_was_just_saved_stays_and_newer_ones_are_set_aside(tmp_path, caplog):
    for step in (100, 200, 300):
        _save(tmp_path, step)
    saved = _save(tmp_path, 50, keep=1)
    assert saved.is_dir() and find_newest(tmp_path) == (saved, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"abandoned-step-{step:08d}" for step in (100, 200, 300)),
        saved.name,
    ]
    assert "set aside as abandoned-step-00000300" in caplog.text
    _save(tmp_path, 100)
    _save(tmp_path, 60)  # a name that is taken
    assert (tmp_path / "abandoned-step-00000100-2").is_dir()


def test_damaged_ones_do_not_count_among_those_that_are_kept(tmp_path):
    for step in (2, 4, 6):
        _save(tmp_path, step)
    (tmp_path / "step-00000006" / "optimizer.safetensors").write_bytes(b"")
    _save(tmp_path, 8, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rejected-step-00000006",
        *(f"step-{step:08d}" for step in (2, 4, 8)),
    ]


def test_a_rotation_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    _save(tmp_path, 1)

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "remove_folder", fail)
    saved = _save(tmp_path, 2, keep=1)
    assert find_newest(tmp_path) == (saved, [])
    assert "could not be removed" in caplog.text and "the new one is whole" in caplog.text


@pytest.mark.parametrize("error", [MemoryError(), SafetensorError("No space left on device"), OSError(5, "I/O error")])
def test_a_machine_that_fails_in_a_save_is_said_so(tmp_path, monkeypatch, error):
    before = _save(tmp_path, 1)

    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(MachineFailed, match=r"could not be written: .*the last good checkpoint is"):
        _save(tmp_path, 2)
    assert find_newest(tmp_path) == (before, [])


ODD_ENTRIES = [
    {}, {"bytes": 1}, {"sha256": ""}, 5, None, "text", [], {"bytes": None, "sha256": None}, {"bytes": "x", "sha256": 1},
]  # fmt: skip


@pytest.mark.parametrize("entry", ODD_ENTRIES, ids=repr)
def test_an_odd_entry_of_a_manifest_rejects_that_checkpoint_alone(tmp_path, entry):
    older, newest = _save(tmp_path, 1), _save(tmp_path, 2)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["state.json"] = entry
    (newest / "manifest.json").write_text(json.dumps(manifest))
    found, rejected = find_newest(tmp_path)
    assert found == older and [path for path, _ in rejected] == [newest]


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "5", '"x"', "[" * 100_000, '{"format": 1, "step": 2, "files": []}', '{"format": 1, "files": null}',
     "9" * 5000, "\ufeff{}", '{"format": 1, "step": 2, "files": {"\\u0000": {"bytes": 0}}}'],
)  # fmt: skip
def test_an_odd_manifest_rejects_that_checkpoint_alone(tmp_path, text):
    older, newest = _save(tmp_path, 1), _save(tmp_path, 2)
    (newest / "manifest.json").write_text(text)
    found, rejected = find_newest(tmp_path)
    assert found == older and [path for path, _ in rejected] == [newest]


def test_a_manifest_lists_exactly_what_a_checkpoint_holds(tmp_path):
    older, newest = _save(tmp_path, 1), _save(tmp_path, 2)
    manifest = json.loads((newest / "manifest.json").read_text())

    def reason(files: dict) -> str:
        (newest / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        found, rejected = find_newest(tmp_path)
        assert found == older
        return rejected[0][1]

    assert "does not list adapter_config.json, adapter_model.safetensors, optimizer" in reason({})
    for name in manifest["files"]:
        assert f"does not list {name}" in reason({key: v for key, v in manifest["files"].items() if key != name})
    for name, why in (
        ("\0", "is missing"),
        ("../step-00000001/state.json", "it lists '../"),
        ("/etc/hosts", "lists '/"),
    ):
        assert why in reason({**manifest["files"], name: manifest["files"]["state.json"]})
    (newest / "more.bin").touch()
    assert "does not list more.bin" in reason(manifest["files"])
    (newest / "more.bin").unlink()
    os.mkfifo(newest / "pipe")
    assert "is not a file" in reason({**manifest["files"], "pipe": {"bytes": 0, "sha256": ""}})


@pytest.mark.parametrize(
    "change",
    [{"step": 10**9}, {"step": "2"}, {"step": True}, {"num_tokens": None}, {"num_labels": -1}, {"config": {}},
     {"layout": 5}, {"optimizer_numbers": {"0.step": "2"}}, {"optimizer_numbers": []}, {"sources": []}],
    ids=repr,
)  # fmt: skip
def test_a_state_of_wrong_values_rejects_its_checkpoint_although_its_digest_is_right(tmp_path, change):
    older, newest = _save(tmp_path, 1), _save(tmp_path, 2)
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    _listed(newest, manifest)
    assert find_newest(tmp_path) == (newest, [])  # the guard: the manifest made here is accepted
    (newest / "state.json").write_text(json.dumps(state | change))
    _listed(newest, manifest)
    found, rejected = find_newest(tmp_path)
    assert found == older and [path for path, _ in rejected] == [newest]
    assert next(iter(change)) in rejected[0][1]


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000, "{", ""])
def test_a_state_of_any_form_rejects_its_checkpoint(tmp_path, text):
    older, newest = _save(tmp_path, 1), _save(tmp_path, 2)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "state.json").write_text(text)
    _listed(newest, manifest)
    assert find_newest(tmp_path)[0] == older


def test_a_full_disk_is_named_and_the_previous_checkpoint_is_intact(tmp_path):
    code = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/test_train")
import test_checkpoint
from qlora_dist.errors import RunFailed
folder = Path(sys.argv[1])
test_checkpoint._save(folder, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # writes beyond fail with EFBIG, as on a full disk
try:
    test_checkpoint._save(folder, 2, size=100_000)
except RunFailed as error:
    print(error)
"""
    done = run_forked(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "step-00000002 could not be written" in done.stdout
    assert f"the last good checkpoint is {tmp_path / 'step-00000001'}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    verify_checkpoint(tmp_path / "step-00000001")


def test_a_disk_that_will_be_full_is_found_before_anything_is_written(tmp_path, monkeypatch):
    _save(tmp_path, 1)
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RunFailed, match=r"could not be written: .*[KM]iB are free.*the last good checkpoint is"):
        _save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_cannot_be_read_here_is_explained(tmp_path):
    with pytest.raises(UserError, match="several nodes need a shared run_dir"):
        load_checkpoint(tmp_path / "step-00000001")


def test_no_checkpoint_file_is_a_pickle(tmp_path):
    path = _save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert os.access(path, os.R_OK)
