"""Breaks the package on purpose, one line at a time, and asks whether the tests notice. By hand, resumable:

    python tests/mutation/run.py                   # all mutants that have no result yet
    python tests/mutation/run.py --again ID ...    # these once more; with no ID: all that survived

A mutant is an entry of mutants/*.toml: a file below qlora_dist, a text that stands in it once, what to put in its
place, and the test files that should notice. It counts as caught when one of them fails, and as survived when all pass;
`equivalent` says why no test can tell it from the original. Each runs in a copy of this checkout below build/mutation;
results are kept there, by the texts of the mutant, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutation" / "copy"
RESULTS = ROOT / "build" / "mutation" / "results.json"
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
        if missing := [name for name in mutant.tests if not (ROOT / "tests" / name).exists()]:
            raise ValueError(f"mutant {mutant.id}: no such test file: {missing}")
    if len({mutant.id for mutant in mutants}) != len(mutants):
        raise ValueError("two mutants have the same id")
    return mutants


def make_copy() -> None:
    """A fresh copy of what git tracks or would track, as it is now."""
    shutil.rmtree(COPY, ignore_errors=True)
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)
    if (ROOT.parent / "shared").exists() and not (COPY.parent / "shared").exists():  # real data of some tests
        (COPY.parent / "shared").symlink_to(ROOT.parent / "shared")


def try_mutant(mutant: Mutant) -> dict[str, object]:
    """Runs the tests of one mutant in the copy, which is restored afterwards."""
    path = COPY / "qlora_dist" / mutant.file
    original = path.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
    environment = {**os.environ, "PYTHONPATH": str(COPY), "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.monotonic()
    try:
        path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
        done = subprocess.run(
            [*command, *(f"tests/{name}" for name in mutant.tests)],
            cwd=COPY, env=environment, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        outcome = {0: "survived", 1: "caught"}.get(done.returncode, f"no result (pytest exit {done.returncode})")
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    except subprocess.TimeoutExpired:
        outcome, failed = "caught", [f"no end within {SECONDS} s"]
    finally:
        path.write_text(original, encoding="utf-8")
    by = failed[0][:200] if failed else ""
    return {"id": mutant.id, "outcome": outcome, "by": by, "seconds": round(time.monotonic() - started, 1)}


def report(mutants: list[Mutant], results: dict[str, dict[str, object]]) -> int:
    """Prints what survived and the share that was caught; returns the number of survivors that should not be."""
    done = [(mutant, results[mutant.key]) for mutant in mutants if mutant.key in results]
    real = [(mutant, result) for mutant, result in done if not mutant.equivalent]
    survived = [mutant for mutant, result in real if result["outcome"] != "caught"]
    for mutant in survived:
        print(f"{results[mutant.key]['outcome']}: {mutant.id} ({mutant.file}: {mutant.old!r} -> {mutant.new!r})")
    for mutant, result in done:
        if mutant.equivalent and result["outcome"] == "caught":
            print(f"called equivalent, but caught: {mutant.id}")
    if real:
        share = 1 - len(survived) / len(real)
        print(f"{len(mutants)} mutants, {len(done)} tried, {len(done) - len(real)} equivalent; caught: {share:.1%}")
    return len(survived)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    options = parser.parse_args()
    mutants = read_mutants()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [mutant for mutant in mutants if not options.ids or mutant.id in options.ids]
    if not options.again:
        chosen = [mutant for mutant in chosen if mutant.key not in results]
    elif not options.ids:
        chosen = [mutant for mutant in chosen if results.get(mutant.key, {}).get("outcome") != "caught"]
    make_copy()
    for mutant in chosen:
        results[mutant.key] = try_mutant(mutant)
        print(results[mutant.key], flush=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(1 if report(mutants, results) else 0)


if __name__ == "__main__":
    main()
