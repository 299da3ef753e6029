"""Breaks the package on purpose, one line at a time, and asks whether the tests notice. By hand, resumable:

    python tests/mutation/run.py                   # all mutants that have no result yet
    python tests/mutation/run.py --again ID ...    # these once more; with no ID: all that survived
    python tests/mutation/run.py --jobs 2          # two at a time
    python tests/mutation/run.py --sound           # on the package as it is, the tests that noticed: all must pass

A mutant is an entry of mutants/*.toml: a file below qlora_dist, a text that stands in it once, what to put in its
place, and the test files (or FILE::TEST) that should notice. It counts as caught when one of them fails, and as
survived when all pass; `equivalent` says why no test can tell it from the original. Each runs in a copy of this
checkout below build/mutation. Results are kept in results.json, each with the commit that it was tried on, by the texts
of the mutant: an interrupted run goes on, and a mutant that was changed counts as not tried.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import hashlib
import json
import math
import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import tomllib

ROOT = Path(__file__).resolve().parents[2]
COPIES = ROOT / "build" / "mutation"
RESULTS = Path(__file__).parent / "results.json"
SECONDS = 600  # per mutant: a hang counts as noticed


@dataclass(frozen=True)
class Mutant:
    """One change of one place."""

    id: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    @property
    def key(self) -> str:
        """Changes when the mutant does."""
        return hashlib.sha256(repr((self.file, self.old, self.new, self.tests)).encode()).hexdigest()[:16]


def read_mutants() -> list[Mutant]:
    """All mutants of the list, each of whose places stands in the package just once. Raises ValueError otherwise."""
    mutants = []
    for path in sorted((Path(__file__).parent / "mutants").glob("*.toml")):
        for raw in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            mutants.append(Mutant(**{**raw, "tests": tuple(raw["tests"])}))
    for mutant in mutants:
        text = (ROOT / "qlora_dist" / mutant.file).read_text(encoding="utf-8")
        if (count := text.count(mutant.old)) != 1:
            raise ValueError(f"mutant {mutant.id}: {mutant.old!r} stands {count} times in {mutant.file}; expected once")
        if missing := [name for name in mutant.tests if not _stands(name)]:
            raise ValueError(f"mutant {mutant.id}: no such test: {missing}")
    if len({mutant.id for mutant in mutants}) != len(mutants):
        raise ValueError("two mutants have the same id")
    return mutants


def _stands(test: str) -> bool:
    """Whether a test file, or FILE::TEST, is there."""
    name, _, function = test.partition("::")
    path = ROOT / "tests" / name
    return path.exists() and f"def {function.partition('[')[0]}" in path.read_text(encoding="utf-8")


def read_results() -> dict[str, dict[str, object]]:
    """By the keys of the mutants."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def write_results(results: dict[str, dict[str, object]]) -> None:
    """One a line, in the order of their ids, so that results of two branches can be merged."""
    lines = [f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in results.items()]
    lines.sort(key=lambda line: line.partition(": ")[2])
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def make_copy(number: int) -> Path:
    """A fresh copy of what git tracks or would track, as it is now."""
    copy = COPIES / f"copy-{os.getpid()}-{number}"
    shutil.rmtree(copy, ignore_errors=True)
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    if (ROOT.parent / "shared").exists() and not (COPIES / "shared").exists():  # real data of some tests
        (COPIES / "shared").symlink_to(ROOT.parent / "shared")
    # checked by content: a changed file is compiled again, all others once
    compileall.compile_dir(copy / "qlora_dist", quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return copy


class Server:
    """Runs pytest in processes forked from one that has imported libraries but nothing of the package."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, copy: Path, tests: Iterable[str], *options: str, seconds: float = math.inf) -> tuple[int, str]:
        """(pytest's exit code, what it printed). Raises TimeoutError; what the tests have started ends, too."""
        # plain assertions: rewriting them would take longer than most of the tests
        arguments = ["-q", "-p", "no:cacheprovider", "--assert=plain", "-m", "not hosts", *options]
        arguments += [f"tests/{name}" for name in tests]
        said, code = copy.with_suffix(".log"), copy.with_suffix(".code")
        code.unlink(missing_ok=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            print(json.dumps([str(copy), arguments]), file=self._process.stdin, flush=True)
            process = int(self._process.stdout.readline())
        deadline = time.monotonic() + seconds
        try:
            while _is_alive(process):
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        # no code: a test's process was ended by what it tests
        return int(code.read_text()) if code.exists() else 1, said.read_text(errors="replace")

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def serve() -> None:
    """Answers each request (a copy, arguments of pytest) with the id of the process that serves it."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pydantic  # noqa: F401
    import pytest
    import transformers.models.llama.modeling_llama  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        name, arguments = json.loads(line)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            copy = Path(name)
            output = os.open(copy.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
                os.dup2(descriptor, target)
            os.chdir(copy)
            os.environ["PYTHONPATH"] = name
            sys.path.insert(0, name)
            code = int(pytest.main(arguments))
            sys.stdout.flush()
            copy.with_suffix(".code").write_text(str(code))
            os._exit(0)
        print(child, flush=True)


def try_mutant(mutant: Mutant, copy: Path, server: Server) -> dict[str, object]:
    """Runs the tests of one mutant in the copy, which is restored afterwards."""
    path = copy / "qlora_dist" / mutant.file
    original = path.read_text(encoding="utf-8")
    started = time.monotonic()
    try:
        path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
        code, said = server.run(copy, mutant.tests, "-x", seconds=SECONDS)
        outcome = {0: "survived", 1: "caught"}.get(code, f"no result (pytest exit {code})")
        failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    except TimeoutError:
        outcome, failed = "caught", [f"no end within {SECONDS} s"]
    finally:
        path.write_text(original, encoding="utf-8")
    by = failed[0][:200] if failed else ""
    return {"id": mutant.id, "outcome": outcome, "by": by, "seconds": round(time.monotonic() - started, 1)}


def try_all(mutants: list[Mutant], results: dict[str, dict[str, object]], jobs: int) -> None:
    """Adds to the results, `jobs` mutants at a time, each in a copy of its own."""
    server = Server()
    free: SimpleQueue[Path] = SimpleQueue()
    for number in range(jobs):
        free.put(make_copy(number))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, check=True, text=True
    )

    def try_one(mutant: Mutant) -> tuple[Mutant, dict[str, object]]:
        copy = free.get()
        try:
            return mutant, try_mutant(mutant, copy, server)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(jobs) as threads:
        for future in as_completed([threads.submit(try_one, mutant) for mutant in mutants]):
            mutant, result = future.result()
            results |= read_results() | {mutant.key: {**result, "commit": commit.stdout.strip()}}
            print(result, flush=True)
            write_results(results)
    server.close()
    while not free.empty():
        shutil.rmtree(free.get())


def tests_that_decide(mutant: Mutant, results: dict[str, dict[str, object]]) -> tuple[str, ...]:
    """The test that noticed it, with all its cases; all of its tests while that is not known."""
    found = re.match(r"(?:FAILED|ERROR) tests/([^\s:]+::\w+)", str(results.get(mutant.key, {}).get("by")))
    return mutant.tests if found is None else (found[1],)


def score(mutants: list[Mutant], results: dict[str, dict[str, object]]) -> tuple[list[Mutant], int, int]:
    """Mutants that survived and should not; how many were caught; of how many that were tried and can be noticed."""
    real = [mutant for mutant in mutants if mutant.key in results and not mutant.equivalent]
    survived = [mutant for mutant in real if results[mutant.key]["outcome"] != "caught"]
    return survived, len(real) - len(survived), len(real)


def report(mutants: list[Mutant], results: dict[str, dict[str, object]]) -> int:
    """Prints what survived and the share that was caught; returns the number of survivors that should not be."""
    survived, caught, real = score(mutants, results)
    for mutant in survived:
        print(f"{results[mutant.key]['outcome']}: {mutant.id} ({mutant.file}: {mutant.old!r} -> {mutant.new!r})")
    for mutant in mutants:
        if mutant.equivalent and results.get(mutant.key, {}).get("outcome") == "caught":
            print(f"called equivalent, but caught: {mutant.id}")
    waiting = sum(mutant.key not in results for mutant in mutants)
    equivalent = sum(bool(mutant.equivalent) for mutant in mutants)
    print(f"{len(mutants)} mutants, {waiting} not tried, {equivalent} equivalent")
    if real:
        print(f"{caught} of {real} that were tried and are not equivalent were caught: {caught / real:.1%}")
    return len(survived)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these, in this order")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at a time")
    parser.add_argument("--sound", action="store_true", help="run the tests of these mutants on the package as it is")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    mutants = read_mutants()
    results = read_results()
    chosen = [mutant for mutant in mutants if not options.ids or mutant.id in options.ids]
    if options.ids:
        chosen.sort(key=lambda mutant: options.ids.index(mutant.id))
    if options.sound:
        tests = sorted({name for mutant in chosen for name in tests_that_decide(mutant, results)})
        server = Server()
        code, said = server.run(make_copy(0), tests)
        server.close()
        print(said)
        sys.exit(code)
    if not options.again:
        chosen = [mutant for mutant in chosen if mutant.key not in results]
    elif not options.ids:
        chosen = [mutant for mutant in chosen if results.get(mutant.key, {}).get("outcome") != "caught"]
    try_all(chosen, results, options.jobs)
    listed = {mutant.key for mutant in read_mutants()}
    write_results({key: one for key, one in read_results().items() if key in listed})
    sys.exit(1 if report(mutants, results) else 0)


if __name__ == "__main__":
    main()
