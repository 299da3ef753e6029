"""pytest --workers: every test once, its outcome and output as without workers, whatever becomes of a worker."""

from __future__ import annotations

import re

import pytest
from helpers.ranks import run_forked

FILES = {
    "test_first.py": """
        import os, pathlib, pytest
        @pytest.fixture(scope="module")
        def shared(tmp_path_factory):
            folder = tmp_path_factory.mktemp("shared")
            yield folder
            (pathlib.Path(os.environ["ENDED"]) / "fixture").touch()
        def test_one(shared):
            (shared / "process").write_text(str(os.getpid()))
        def test_two_has_what_one_left(shared):
            assert (shared / "process").read_text() == str(os.getpid())
        @pytest.mark.skip(reason="not here")
        def test_skipped(): ...
    """,
    "test_second.py": """
        import os, pytest
        def test_prints_and_fails(tmp_path):
            print("what it said")
            os.write(1, b"below python")
            assert [1, 2] == [1, 3]
        @pytest.mark.parametrize("number", [0, 1])
        def test_each(number): ...
    """,
    "test_third.py": """
        import os, signal
        def test_before(): ...
        def test_kills_its_worker():
            os.kill(os.getpid(), signal.SIGKILL)
        def test_after(): ...
    """,
}


def run(folder, *options):
    for name, text in FILES.items():
        (folder / name).write_text("\n".join(line[8:] for line in text.splitlines()))
    code = f"""
        import os, sys, pytest
        os.environ["ENDED"] = {str(folder)!r}
        sys.exit(int(pytest.main([
            "-p", "helpers.workers", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", {str(folder)!r},
            "--basetemp", {str(folder / "temp")!r}, "-rA", *{options!r}, {str(folder)!r},
        ])))
    """
    return run_forked(code)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_test_is_run_once_and_has_its_outcome_also_when_a_worker_dies(tmp_path, workers):
    done = run(tmp_path, "--workers", str(workers))
    assert done.returncode == 1, done.stderr
    outcomes = dict(
        reversed(line.split(" ")[:2]) for line in done.stdout.splitlines() if line.startswith(("PASSED ", "FAILED "))
    )
    assert {name.partition("::")[2]: outcome for name, outcome in outcomes.items()} == {
        "test_one": "PASSED", "test_two_has_what_one_left": "PASSED", "test_prints_and_fails": "FAILED",
        "test_each[0]": "PASSED", "test_each[1]": "PASSED", "test_before": "PASSED", "test_kills_its_worker": "FAILED",
        "test_after": "PASSED",
    }  # fmt: skip
    assert "2 failed, 6 passed, 1 skipped" in done.stdout
    assert "its worker ended in this test: SIGKILL" in done.stdout
    assert "what it said\nbelow python" in done.stdout and "assert [1, 2] == [1, 3]" in done.stdout
    assert (tmp_path / "fixture").exists()


def test_workers_end_at_the_first_failure_that_is_too_many(tmp_path):
    done = run(tmp_path, "--workers", "1", "--maxfail", "1")
    assert done.returncode == 1 and re.search(r"stopping after 1 failures", done.stdout), done.stdout
    assert "test_before" not in done.stdout
