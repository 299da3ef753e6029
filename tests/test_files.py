"""Files and folders are complete or absent whatever interrupts their writer; a manifest finds what changed later."""

import fcntl
import json
import os
import time

import pytest

from qlora_dist import files
from qlora_dist.files import (
    DamagedFolder,
    check_manifest,
    digests,
    folder_aside,
    is_whole,
    other_writers,
    remove_leftovers,
    sha256,
    write_manifest,
    write_text,
)

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
    assert is_whole(target, HEAD, hashing="none")  # the size alone
    with pytest.raises(DamagedFolder, match=r"inner/b.txt is damaged: its SHA-256"):
        check_manifest(target, HEAD)
    inner.write_text("longer")
    with pytest.raises(DamagedFolder, match=r"inner/b.txt has 6 bytes, 3 were written"):
        check_manifest(target, HEAD, hashing="none")
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


@pytest.mark.parametrize(
    "text", ["", "[]", "5", '{"files": 5}', '{"files": {"a": 5', "[" * 100_000, "\xff", '"\\ud800"']
)
def test_a_manifest_of_any_form_is_damage(tmp_path, text):
    _write(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_bytes(text.encode("latin-1"))
    assert not is_whole(tmp_path / "out", HEAD)


def test_a_manifest_that_must_name_everything_finds_what_was_added(tmp_path):
    target = tmp_path / "out"
    _write(target)
    check_manifest(target, HEAD, required=["a.txt"])
    with pytest.raises(DamagedFolder, match=r"does not list model.safetensors"):
        check_manifest(target, HEAD, required=["model.safetensors"])
    (target / ".nfs0001").touch()
    check_manifest(target, HEAD, required=[])
    for name in ("more.txt", "inner/more.txt"):
        (target / name).touch()
        with pytest.raises(DamagedFolder, match=rf"does not list {name}"):
            check_manifest(target, HEAD, required=[])
        (target / name).unlink()
    (target / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(DamagedFolder, match="does not list elsewhere"):
        check_manifest(target, HEAD, required=[])


# --- digests ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Of a user whose record is empty."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read to hash them, as it happens."""
    names = []
    monkeypatch.setattr(files, "sha256", lambda path: names.append(path.name) or sha256(path))
    return names


def _old_file(folder, name="a.bin", content=b"content", age=60):
    path = folder / name
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def _later(monkeypatch, seconds=60):
    """Lets time pass since the files were made: their time of change (ctime) cannot be set."""
    then = time.time() + seconds
    monkeypatch.setattr(files.time, "time", lambda: then)


def test_a_file_is_hashed_once_until_it_changes_in_any_way(home, tmp_path, monkeypatch, hashed):
    _later(monkeypatch)
    path, other = _old_file(tmp_path), _old_file(tmp_path, "b.bin", b"other")
    expected = [sha256(path), sha256(other)]
    assert digests([path, other]) == expected and sorted(hashed) == ["a.bin", "b.bin"]
    assert digests([path, other]) == expected and len(hashed) == 2
    assert digests([path], believes="none") == expected[:1] and len(hashed) == 3
    before = path.stat()
    path.write_bytes(b"CONTENT")  # as long as before, and its time of change is set back
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests([path]) == [sha256(path)] != expected[:1]
    replaced = _old_file(tmp_path, "c.bin", b"Content")
    os.utime(replaced, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(replaced, path)
    assert digests([path]) == [sha256(path)]
    assert (home / ".cache/qlora_dist/verified.json").stat().st_mode & 0o777 == 0o600


def test_what_changed_a_moment_ago_is_hashed_again(home, tmp_path, hashed):
    path = tmp_path / "new.bin"
    path.write_bytes(b"1")
    assert digests([path]) == digests([path]) and len(hashed) == 2
    assert not (home / ".cache").exists()


def test_what_changes_while_it_is_hashed_is_hashed_again(home, tmp_path, monkeypatch):
    _later(monkeypatch)
    path = _old_file(tmp_path)

    def hash_then_change(path):
        found = sha256(path)
        path.write_bytes(b"changed")
        return found

    monkeypatch.setattr(files, "sha256", hash_then_change)
    digests([path])
    monkeypatch.setattr(files, "sha256", sha256)
    assert digests([path]) == [sha256(path)]


@pytest.mark.parametrize("record", ["", "[]", '{"a": 5}', "[" * 100_000, "folder", "pipe", "link", "shared"])
def test_a_record_of_any_form_is_only_not_used(home, tmp_path, monkeypatch, hashed, record):
    _later(monkeypatch)
    path = _old_file(tmp_path)
    digests([path])
    file = home / ".cache/qlora_dist/verified.json"
    good = file.read_text()
    file.unlink()
    if record == "folder":
        file.mkdir()
    elif record == "pipe":
        os.mkfifo(file)
    elif record == "link":
        (tmp_path / "elsewhere").write_text(good)
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_text(good if record == "shared" else record)
        file.chmod(0o666 if record == "shared" else 0o600)
    hashed.clear()
    assert digests([path]) == [sha256(path)] and hashed == ["a.bin"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")
def test_the_files_of_another_user_are_hashed_every_time(home, tmp_path, monkeypatch, hashed):
    _later(monkeypatch)
    target = tmp_path / "out"
    _write(target)
    for _ in range(2):
        check_manifest(target, HEAD, hashing="recorded")
    assert sorted(hashed) == ["a.txt", "a.txt", "b.txt", "b.txt"]  # once to write the manifest, once to check it
    assert other_writers(target) == ""
    os.chown(target / "a.txt", 65534, 65534)
    hashed.clear()
    for _ in range(2):
        check_manifest(target, HEAD, hashing="recorded")
    assert hashed == ["a.txt", "a.txt"]
    assert other_writers(target).startswith("user ")
    os.chown(target / "a.txt", 0, 0)
    (target / "inner").chmod(0o777)
    assert other_writers(target) == "every user may write to it"


def test_a_written_folder_is_never_writable_for_every_user(tmp_path):
    before = os.umask(0)
    try:
        _write(tmp_path / "out")
    finally:
        os.umask(before)
    assert other_writers(tmp_path / "out") == ""


# --- leftovers --------------------------------------------------------------------------------------------------------


def _left_by(host, age=0.0, at=None):
    path = at / f".out.incomplete-{host}-12345678"
    path.mkdir()
    (path / "half").write_text("")
    for inner in (path / "half", path):
        os.utime(inner, (time.time() - age,) * 2)
    return path


def test_beside_other_writers_only_what_certainly_has_none_is_removed(tmp_path):
    here, day = os.uname().nodename, 86_400
    of_a_killed, foreign = _left_by(here, at=tmp_path), _left_by("elsewhere", at=tmp_path)
    stale = _left_by("elsewhere-2", age=2 * day, at=tmp_path)
    with folder_aside(tmp_path / "out", replaces=False) as aside:
        assert not of_a_killed.exists() and not stale.exists() and foreign.exists()
        remove_leftovers(tmp_path / "out", is_only_writer=False)
        assert aside.exists()  # its writer is at work
    remove_leftovers(tmp_path / "out")
    assert _names(tmp_path) == ["out"]


def test_without_file_locks_nobody_removes_what_another_one_may_be_writing(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = _left_by(os.uname().nodename, at=tmp_path)
    with folder_aside(tmp_path / "out", replaces=False):
        assert left.exists()
