"""Documents are built once, for everything that may change their tokens, and by one process at a time."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
from helpers.documents import ALPACA, answers, build, write
from helpers.tiny_tokenizers import sentencepiece_tokenizer

from qlora_dist.cluster import file_lock
from qlora_dist.config import SourceConfig
from qlora_dist.data.documents import build as build_module
from qlora_dist.errors import UserError


@pytest.fixture
def alpaca(tmp_path):
    return SourceConfig(path=write(tmp_path / "alpaca.jsonl", ALPACA))


@pytest.mark.parametrize(
    "change",
    [
        {"row_tokens": 256},
        {"learn": "all"},
        {"template": "vicuna"},
        {"on_long": "drop"},
        {"tokenizer": "sentencepiece"},
    ],
    ids=str,
)
def test_anything_that_may_change_the_tokens_gives_another_store(tmp_path, alpaca, change):
    change = {key: sentencepiece_tokenizer() if key == "tokenizer" else value for key, value in change.items()}
    assert build(tmp_path, alpaca, **change)._store.folder != build(tmp_path, alpaca)._store.folder


def test_the_store_depends_on_file_content_and_not_on_file_names(tmp_path, alpaca, monkeypatch):
    before = build(tmp_path, alpaca)
    copy = SourceConfig(path=write(tmp_path / "copy.jsonl", ALPACA))
    changed = [dict(ALPACA[0], output="Changed."), *ALPACA[1:]]
    write(tmp_path / "alpaca.jsonl", changed)
    assert answers(build(tmp_path, alpaca))[0] == "Changed.<|endoftext|>"
    monkeypatch.setattr(build_module.Build, "run", None)
    again = build(tmp_path, copy)
    assert again._store.folder == before._store.folder and again.stats.sources[0].path == copy.path


def test_a_damaged_store_is_built_again(tmp_path, alpaca):
    documents = build(tmp_path, alpaca)
    file = documents._store.folder / "input_ids.bin"
    expected = answers(documents)
    del documents
    file.write_bytes(file.read_bytes()[:-4])
    assert answers(build(tmp_path, alpaca)) == expected
    file.write_bytes(b"\0" * file.stat().st_size)
    assert answers(build(tmp_path, alpaca)) == expected


def _build_and_report(tmp_path, source, queue, arrived):
    built = []
    original, acquire = build_module.Build.run, file_lock._acquire

    def acquiring(*args):
        arrived.release()
        acquire(*args)

    def run(self, *args):
        built.append(True)
        for _ in range(2):  # the other process is at the lock too
            arrived.acquire(timeout=30)
        original(self, *args)

    build_module.Build.run, file_lock._acquire = run, acquiring
    queue.put((len(build(tmp_path, source)), len(built)))


def test_two_processes_with_a_cold_cache_build_it_once(tmp_path, alpaca):
    context = multiprocessing.get_context("fork")
    queue, arrived = context.Queue(), context.Semaphore(0)
    processes = [context.Process(target=_build_and_report, args=(tmp_path, alpaca, queue, arrived)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [count for count, _ in results] == [40, 40]
    assert sum(built for _, built in results) == 1


def _build_and_hang(tmp_path, source, reached):
    from qlora_dist.data.documents import store

    def hang(*_):
        reached.set()
        signal.pause()

    store._count_duplicates = hang  # all tokens are written, the store has no name yet
    build(tmp_path, source)


def test_what_a_killed_builder_leaves_is_not_trusted_and_does_not_block_the_next(tmp_path, alpaca):
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    process = context.Process(target=_build_and_hang, args=(tmp_path, alpaca, reached))
    process.start()
    assert reached.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    left = list((tmp_path / "cache").glob(".*.incomplete*"))
    assert left  # the test is not vacuous: a partly written store is left
    assert len(build(tmp_path, alpaca)) == 40
    assert not [path for path in left if path.exists()]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    source = SourceConfig(path=write(tmp_path / "a.jsonl", [*ALPACA, {"instruction": 1, "output": ""}]))
    with pytest.raises(UserError):
        build(tmp_path, source)
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


def test_only_per_document_numbers_are_kept_in_memory(tmp_path, alpaca):
    documents = build(tmp_path, alpaca)
    assert isinstance(documents._store._input_ids, np.memmap)
    example = documents[3]
    example.input_ids[0] = 7  # a copy: the store is not written to
    assert documents[3].input_ids[0] != 7
