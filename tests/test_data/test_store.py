"""Tokenized data on disk: believed only while every file is as it was written, and built again otherwise."""

import errno
import importlib.metadata
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_tokenizers import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config import SourceConfig
from qlora_dist.data.documents import build as build_module
from qlora_dist.data.documents import build_documents
from qlora_dist.data.documents import sources as sources_module
from qlora_dist.data.documents.store import COLUMNS, FILES, HEAD, check_store, open_store
from qlora_dist.errors import MachineFailed
from qlora_dist.files import DamagedFolder, write_manifest

ROWS = [{"instruction": f"Say {i}", "output": f"The number {i}."} for i in range(8)]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return SourceConfig(path=write(tmp_path / "rows.jsonl", ROWS))


def build(tmp_path, source, **options):
    return build_documents([source], byte_level_tokenizer(), row_tokens=256, cache_dir=tmp_path / "cache", **options)


def tokens(documents):
    return [documents[i].input_ids.tolist() for i in range(len(documents))]


@pytest.fixture
def num_builds(monkeypatch):
    """How often a store was built, as a list that grows."""
    builds, run = [], build_module.Build.run
    monkeypatch.setattr(build_module.Build, "run", lambda *args: builds.append(1) or run(*args))
    return builds


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_found_whatever_its_size_and_time(tmp_path, source, num_builds, name, caplog):
    documents = build(tmp_path, source)
    folder, expected = documents._store.folder, tokens(documents)
    path = folder / name
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = build(tmp_path, source)
    assert tokens(again) == expected and again.fingerprint == documents.fingerprint and len(num_builds) == 2
    assert f"is not whole ({name} is damaged" in caplog.text
    build(tmp_path, source)
    assert len(num_builds) == 2


def test_a_rank_beside_one_that_has_checked_compares_sizes(tmp_path, source, num_builds, monkeypatch):
    folder = build(tmp_path, source)._store.folder
    monkeypatch.setattr("qlora_dist.files.sha256", None)
    monkeypatch.setattr(sources_module, "digests", lambda files: ["digest"] * len(files))
    with pytest.raises(TypeError):
        build(tmp_path, source)  # the guard: it would have been hashed
    monkeypatch.undo()
    check_store(folder, "none")


def _stored(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


NUMBERS = st.integers(-(2**31), 2**31 - 1)
COLUMN = st.one_of(
    st.binary(max_size=40),
    st.lists(NUMBERS, max_size=10).map(lambda some: _stored(np.array(some, dtype=np.int32))),
    st.lists(NUMBERS, min_size=8, max_size=8).map(lambda some: _stored(np.array(some, dtype=np.int32))),
    st.lists(st.integers(0, 9), min_size=8, max_size=8).map(lambda some: _stored(np.array(some, dtype=np.float64))),
    st.just(b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999,), }".ljust(128)),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
STATS = st.one_of(
    JSON.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[" * 10**5, b"\xff", b"", b"[{}]"]),
    st.tuples(st.sampled_from(["path", "records", "unread", "tokens", "format"]), JSON).map(
        lambda change: json.dumps([{"path": "p", "records": 8, change[0]: change[1]}]).encode()
    ),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(sorted(COLUMNS)), COLUMN, max_size=2), st.one_of(st.none(), STATS))
def test_a_store_of_any_content_under_a_right_manifest_opens_or_is_damaged(whole, columns, stats):
    changed = {f"{name}.npy": content for name, content in columns.items()}
    if stats is not None:
        changed["stats.json"] = stats
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, content in {**whole, **changed}.items():
            (folder / name).write_bytes(content)
        write_manifest(folder, HEAD)
        try:
            check_store(folder, "all")
        except DamagedFolder:
            return
        store = open_store(folder)
        assert [len(store[i].input_ids) for i in range(len(store.lengths))] == store.lengths.tolist()
        assert all(isinstance(source.unread_text(), str) for source in store.stats)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Content of the files of a store, by name."""
    place = tmp_path_factory.mktemp("whole")
    folder = build(place, SourceConfig(path=write(place / "rows.jsonl", ROWS)))._store.folder
    return {name: (folder / name).read_bytes() for name in FILES}


# --- what a store is named by -----------------------------------------------------------------------------------------


def test_another_version_of_what_makes_the_tokens_makes_another_store(tmp_path, source, monkeypatch):
    folders = {build(tmp_path, source)._store.folder}
    monkeypatch.setattr(build_module, "_code_digest", lambda: "of other code")
    folders.add(build(tmp_path, source)._store.folder)
    monkeypatch.undo()
    version = importlib.metadata.version
    for library in ("tokenizers", "transformers"):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, of=library: "0.0" if name == of else version(name)
        )
        folders.add(build(tmp_path, source)._store.folder)
        monkeypatch.undo()
    assert len(folders) == 4


def test_the_code_that_makes_the_tokens_is_hashed(tmp_path, monkeypatch):
    documents = tmp_path / "data" / "documents"
    for room in ("documents", "formats", "templates"):
        (tmp_path / "data" / room).mkdir(parents=True)
        (tmp_path / "data" / room / "code.py").write_text("x = 1")
    monkeypatch.setattr(build_module, "__file__", str(documents / "build.py"))
    digests = set()
    for room in ("documents", "formats", "templates"):
        build_module._code_digest.cache_clear()
        digests.add(build_module._code_digest())
        (tmp_path / "data" / room / "code.py").write_text("x = 2")
    build_module._code_digest.cache_clear()
    digests.add(build_module._code_digest())
    build_module._code_digest.cache_clear()
    assert len(digests) == 4


# --- what happens meanwhile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_a_file_that_changes_between_hashing_and_reading_is_not_kept(tmp_path, source, monkeypatch, how):
    run, path = build_module.Build.run, Path(source.path)
    original = path.read_bytes()

    def change_first(*args):
        if how == "replaced":
            write(tmp_path / "other.jsonl", ROWS[::-1])
            os.replace(tmp_path / "other.jsonl", path)
        else:
            write(path, ROWS[::-1])
        run(*args)

    monkeypatch.setattr(build_module.Build, "run", change_first)
    with pytest.raises(MachineFailed, match=r"rows.jsonl was written to or replaced while it was being read"):
        build(tmp_path, source)
    monkeypatch.undo()
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if not entry.name.endswith(".lock")] == []
    path.write_bytes(original)
    assert byte_level_tokenizer().decode(build(tmp_path, source)[0].input_ids).count("Say 0") == 1


class _FullDisk:
    """A file on a disk that is full: what is written stays in its buffer until it is closed, and then fails."""

    def __init__(self):
        self.is_closed = False

    def write(self, _):
        pass

    def close(self):
        self.is_closed = True
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing_of_a_store_and_says_what_to_do(tmp_path, source, monkeypatch):
    opened, real = [], Path.open

    def full(self, mode="r", *args, **kwargs):
        if mode == "wb" and self.suffix == ".bin":
            opened.append(_FullDisk())
            return opened[-1]
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MachineFailed, match=r"data.cache_dir .*No space left.*free space .*same command"):
        build(tmp_path, source)
    monkeypatch.undo()
    assert len(opened) == 2 and all(file.is_closed for file in opened)
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if not entry.name.endswith(".lock")] == []
    assert len(build(tmp_path, source)) == 8
