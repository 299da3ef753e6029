"""What a fault costs: the steps that are lost, and the seconds until all ranks have exited.

    python -m benchmarks.faults --out benchmarks/results/cpu/faults.json [-k EXPRESSION]

The faults are those of tests/test_train/test_faults.py, injected into runs of two CPU ranks; `-k` chooses as pytest
does. Seconds depend on the machine's load, which the file records: a limit that is stated in the fault is part of them.
The file's rows are those of the table in docs/faults.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import provenance

TESTS = "tests/test_train/test_faults.py"
HEAD = "| fault | outcome | steps lost | seconds to stop |\n|---|---|---|---|\n"


def measure(expression: str) -> list[dict[str, str]]:
    """One row for each fault. Raises CalledProcessError when the package does not stand one."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS, "-k", expression],
            cwd=provenance.ROOT,
            env={**os.environ, "QLORA_DIST_FAULTS_TABLE": str(rows)},
            check=True,
        )
        found: list[dict[str, str]] = json.loads(rows.read_text())
    return found


def line(row: dict[str, str]) -> str:
    """A row of the table in docs/faults.md."""
    return f"| {row['fault']} | {row['outcome']} | {row['steps_lost']} | {row['seconds']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-k", dest="expression", default="", help="which of the tests, as for pytest")
    parser.add_argument("--allow-dirty", action="store_true")
    options = parser.parse_args()
    provenance.require_clean(options.allow_dirty)
    origin = provenance.collect(provenance.this_command("benchmarks.faults"), torch.device("cpu"))
    record = {"benchmark": "faults", **origin, "results": measure(options.expression)}
    record["hardware"]["load_average_at_end"] = list(os.getloadavg())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(HEAD + "\n".join(map(line, record["results"])))


if __name__ == "__main__":
    main()
