"""A shared folder is built once, by one of many processes and users; what others could have planted is said."""

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_dist.cluster import file_lock
from qlora_dist.cluster.file_lock import build_lock, build_once
from qlora_dist.errors import MachineFailed, UserError
from qlora_dist.files import check_manifest, folder_aside, write_manifest

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


class Entry:
    """A folder with one file."""

    def __init__(self, root, content="made"):
        self.folder = Path(root) / "entry"
        self.content = content
        self.num_built = 0

    def check(self):
        check_manifest(self.folder, {"format": 1}, required=["a.txt"])

    def build(self):
        self.num_built += 1
        with folder_aside(self.folder, replaces=False) as aside:
            (aside / "a.txt").write_text(self.content)
            write_manifest(aside, {"format": 1})

    def get(self):
        build_once(self.folder, check=self.check, build=self.build, what="making it", setting="the.setting")
        return (self.folder / "a.txt").read_text()


@pytest.fixture
def shared():
    """A folder that every user may write to, as /tmp is."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def as_user(number, function):
    """What a function returns, or the text of its error, in a process of another user."""

    def run(results):
        os.setgroups([])
        os.setgid(number)
        os.setuid(number)
        try:
            results.put(function())
        except (UserError, MachineFailed, OSError) as error:
            results.put(f"{type(error).__name__}: {error}")

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=run, args=(results,))
    process.start()
    result = results.get(timeout=60)
    process.join(60)
    return result


def test_what_is_whole_is_used_and_what_is_not_is_built_again_and_said(tmp_path, caplog):
    entry = Entry(tmp_path / "new" / "folder")
    assert entry.get() == entry.get() == "made" and entry.num_built == 1 and not caplog.records
    (entry.folder / "a.txt").write_text("MADE")
    assert entry.get() == "made" and entry.num_built == 2
    assert "is not whole (a.txt is damaged" in caplog.text
    for odd in (Path.touch, os.mkfifo, Path.mkdir, lambda path: path.symlink_to(tmp_path)):
        shutil.rmtree(entry.folder)
        odd(entry.folder)
        assert entry.get() == "made"
        assert [path.name for path in entry.folder.parent.iterdir() if not path.name.endswith(".lock")] == ["entry"]


def test_of_two_builders_without_file_locks_the_first_wins_and_the_second_uses_its_folder(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = Entry(tmp_path, "first"), Entry(tmp_path, "second")

    def build_while_the_first_does():
        with folder_aside(second.folder, replaces=False) as aside:
            first.build()
            (aside / "a.txt").write_text("second")
            write_manifest(aside, {"format": 1})

    monkeypatch.setattr(second, "build", build_while_the_first_does)
    assert second.get() == "first" and first.get() == "first"
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["entry"]


def test_a_builder_that_fails_says_why(tmp_path, monkeypatch):
    entry = Entry(tmp_path)

    def fails():
        raise MachineFailed("the disk is full")

    monkeypatch.setattr(entry, "build", fails)
    with pytest.raises(MachineFailed, match="the disk is full"):
        entry.get()


@as_root
def test_users_share_what_one_of_them_has_built(shared, caplog):
    assert as_user(NOBODY, Entry(shared).get) == "made"
    mine = Entry(shared, "mine")
    with caplog.at_level(logging.WARNING):
        assert mine.get() == "made" and mine.num_built == 0
    assert (
        "others could have written both (user" in caplog.text
        and "set the.setting to a folder of your own" in caplog.text
    )
    # and the other way round: what root has built is used by others without a word
    shutil.rmtree(mine.folder)
    mine.get()
    assert as_user(NOBODY, Entry(shared, "theirs").get) == "mine"


@as_root
def test_users_wait_for_each_other(shared):
    before = os.umask(0o077)
    try:
        with build_lock(shared / "entry", "making it"):
            pass  # the file of the lock is now root's, in a folder like /tmp
    finally:
        os.umask(before)
    assert as_user(NOBODY, Entry(shared).get) == "made"
    with build_lock(shared / "entry", "making it"):

        def try_lock():
            descriptor = file_lock._open_for_all(shared / ".entry.lock")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

        assert as_user(NOBODY, try_lock).startswith("BlockingIOError")


@as_root
def test_what_another_user_has_damaged_is_named_with_the_way_out(shared):
    entry = Entry(shared)
    entry.get()
    (entry.folder / "a.txt").write_text("MADE")
    said = as_user(NOBODY, Entry(shared).get)
    assert said.startswith("UserError: the.setting:") and "is damaged and cannot be replaced" in said
    assert "choose another place" in said


@as_root
def test_a_planted_folder_is_said(shared, caplog):
    def plant():
        entry = Entry(shared, "planted")
        entry.build()
        for path in (entry.folder, *entry.folder.iterdir()):
            path.chmod(0o777)
        return json.loads((entry.folder / "manifest.json").read_text())["format"]

    assert as_user(NOBODY, plant) == 1
    Entry(shared).get()
    assert "every user may write to it, user" in caplog.text


def test_a_lock_that_is_no_file_is_refused(tmp_path):
    lock = tmp_path / ".entry.lock"
    for odd in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("elsewhere")):
        odd(lock)
        with pytest.raises(UserError, match=r"the.setting: the lock|is not a file, where a lock file is expected"):
            Entry(tmp_path).get()
        lock.rmdir() if lock.is_dir() else lock.unlink()
    assert list(tmp_path.iterdir()) == []


def test_who_waits_names_who_builds_and_gives_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(file_lock, "_POLL_SECONDS", 0.0)
    with (
        build_lock(tmp_path / "entry", "making it"),
        pytest.raises(UserError, match=r"waited .* for another process that is making it"),
        build_lock(tmp_path / "entry", "making it", timeout_seconds=0.01),
    ):
        pass
    assert f"waiting for process {os.getpid()} on" in caplog.text


def test_who_waits_goes_on_when_the_other_is_done_and_uses_what_it_has_built(tmp_path, monkeypatch):
    entry, other = Entry(tmp_path), Entry(tmp_path, "by another")
    with contextlib.ExitStack() as stack:
        stack.enter_context(build_lock(entry.folder, "making it"))

        def built_meanwhile(_):
            other.build()
            stack.close()

        monkeypatch.setattr(file_lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=built_meanwhile))
        assert entry.get() == "by another"
    assert (entry.num_built, other.num_built) == (0, 1)
