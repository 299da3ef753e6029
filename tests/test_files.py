"""Files and folders are complete or absent whatever interrupts their writer; a manifest finds what changed later."""

import json
import os

import pytest

from qlora_dist import files
from qlora_dist.files import DamagedFolder, check_manifest, folder_aside, is_whole, write_manifest, write_text

HEAD = {"format": 1}


def _write(target, content="new", **options):
    with folder_aside(target, **options) as aside:
        (aside / "inner").mkdir()
        (aside / "a.txt").write_text(content)
        (aside / "inner" / "b.txt").write_text(content)
        write_manifest(aside, HEAD)


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_replaces_an_older_one_and_its_leftovers(tmp_path):
    target = tmp_path / "result[1]"  # a name that is also a pattern
    _write(target, "old")
    (tmp_path / ".result[1].incomplete-1234").mkdir()
    _write(target)
    assert _names(tmp_path) == ["result[1]"] and (target / "a.txt").read_text() == "new"
    check_manifest(target, HEAD)


def test_a_writer_that_is_not_alone_never_replaces_what_another_one_wrote(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(OSError), folder_aside(target, replaces=False) as aside:
        (aside / "mine").touch()
        (target / "theirs").touch()  # while this one was writing
    assert _names(tmp_path) == ["out"] and _names(target) == ["theirs"]
    (target / "theirs").unlink()
    _write(target, replaces=False)  # an empty folder is taken
    check_manifest(target, HEAD)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_libraries_write_for_the_owner_alone_is_readable_as_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        with folder_aside(tmp_path / "out") as aside:
            (aside / "inner").mkdir()
            for path in (aside / "a", aside / "inner" / "b"):
                path.touch(0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "out" / "a", tmp_path / "out" / "inner" / "b"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("failing", [1, 2])
def test_what_was_there_stays_when_a_rename_fails(tmp_path, monkeypatch, failing):
    target = tmp_path / "out"
    _write(target, "old")
    rename, calls = files.os.rename, []

    def fails(*paths):
        calls.append(paths)
        if len(calls) == failing:
            raise OSError("no")
        rename(*paths)

    monkeypatch.setattr(files.os, "rename", fails)
    with pytest.raises(OSError, match="no"):
        _write(target)
    assert _names(tmp_path) == ["out"] and (target / "a.txt").read_text() == "old"


def test_a_manifest_finds_every_change_in_every_subfolder(tmp_path):
    target = tmp_path / "out"
    _write(target)
    assert is_whole(target, HEAD) and not is_whole(target, {"format": 2}) and not is_whole(tmp_path / "none", HEAD)
    inner = target / "inner" / "b.txt"
    inner.write_text("NEW")
    assert is_whole(target, HEAD, hash_limit=2)  # of larger files the size alone
    with pytest.raises(DamagedFolder, match=r"inner/b.txt is damaged: its SHA-256"):
        check_manifest(target, HEAD)
    inner.write_text("longer")
    with pytest.raises(DamagedFolder, match=r"inner/b.txt has 6 bytes, 3 were written"):
        check_manifest(target, HEAD, hash_limit=-1)
    inner.unlink()
    with pytest.raises(DamagedFolder, match=r"inner/b.txt is missing"):
        check_manifest(target, HEAD)


@pytest.mark.parametrize("entry", [5, None, [], {}, {"sha256": "0"}, {"bytes": 3}, "text"])
def test_an_odd_manifest_is_damage_and_not_a_traceback(tmp_path, entry):
    _write(tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(json.dumps({**HEAD, "files": {"a.txt": entry}}))
    with pytest.raises(DamagedFolder, match=r"manifest.json cannot be read"):
        check_manifest(tmp_path / "out", HEAD)
    manifest.write_text(json.dumps(entry))
    assert not is_whole(tmp_path / "out", HEAD)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old" and _names(tmp_path) == ["a.json"]
