"""Proves every family anew: `make support`. FAMILY names as arguments prove only these, and keep the other rows.
PROOF names after --only run only these proofs, and keep a row's other cells.

Writes docs/parts/support.json, from which `python -m docs.generate` writes docs/support.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import transformers

from .configs import families
from .proofs import PROOFS
from .rows import as_json, row_of

RESULTS = Path(__file__).parents[2] / "docs/parts/support.json"


def main(chosen: list[str], only: list[str]) -> None:
    known = families()
    rows = json.loads(RESULTS.read_text())["families"] if (chosen or only) and RESULTS.exists() else {}
    for family in chosen or known:
        start = time.perf_counter()
        row = row_of(family, only or None)
        if only and "cells" in row:
            row["cells"] = rows.get(family, {}).get("cells", {}) | row["cells"]
        rows[family] = row
        text = f"refused: {row['refused']}" if "refused" in row else ""
        text = text or "; ".join(f"{name}: {cell}" for name, cell in row["cells"].items() if cell != "yes") or "yes"
        print(f"{family:24} {time.perf_counter() - start:5.1f} s  {text}"[:600], flush=True)
        found = {family: rows[family] for family in known if family in rows}
        RESULTS.write_text(as_json({"transformers": transformers.__version__, "families": found}))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--only", nargs="+", default=[], choices=PROOFS.keys())
    arguments = parser.parse_args()
    main(arguments.families, arguments.only)
