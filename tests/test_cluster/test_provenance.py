"""What a result says of the code that made it changes with every byte of that code."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_dist.cluster import provenance


@pytest.fixture
def package(tmp_path, monkeypatch) -> Iterator[Path]:
    """A package in place of this one: two modules below a checkout's folder."""
    for name in ("package/__init__.py", "package/cluster/provenance.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "package" / "cluster" / "provenance.py"))
    yield tmp_path / "package"
    provenance.code_digest.cache_clear()
    provenance.commit.cache_clear()


def digest() -> str:
    """As a process would find it that starts now."""
    provenance.code_digest.cache_clear()
    return provenance.code_digest()


def commit() -> str | None:
    """As a process would find it that starts now."""
    provenance.commit.cache_clear()
    return provenance.commit()


def test_the_digest_of_the_code_tells_every_change_and_no_copy(package):
    seen = [digest()]
    (package / "__init__.py").write_text("x = 2\n")
    seen.append(digest())
    (package / "cluster" / "more.py").write_text("")
    seen.append(digest())
    (package / "cluster" / "more.py").rename(package / "cluster" / "other.py")
    seen.append(digest())
    assert len(set(seen)) == len(seen)
    (package / "README").write_text("no code")
    (package / "cluster" / "other.py").rename(package / "cluster" / "more.py")
    assert digest() == seen[2]


def test_a_commit_is_called_dirty_when_the_files_are_not_its(package, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(package.parents[1]))
    assert commit() is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(package.parent), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", "--all")
    git("commit", "--message", "first")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    (package / "__init__.py").write_text("x = 2\n")
    assert commit() == f"{head}-dirty"


def test_files_that_change_under_a_running_process_do_not_change_what_it_says_of_its_code(package):
    before = digest(), commit()
    (package / "__init__.py").write_text("x = 3\n")
    assert (provenance.code_digest(), provenance.commit()) == before
    assert digest() != before[0]
