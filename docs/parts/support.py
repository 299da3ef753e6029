"""What is proven of each family, and what is refused: support.json, which `make support` computes (tests/support)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docs.parts.markdown import prose, table

RESULTS = Path(__file__).with_name("support.json")

# the proofs of tests/support/proofs.py, in words: a test compares the names
PROOFS = {
    "plan": "the memory plan counts the weights that the model has, and knows every kind of them",
    "NF4": "codes and constants are those of bitsandbytes, in every linear layer and every expert",
    "all-linear": "every linear layer can have an adapter; where not, the other proofs adapt attention alone",
    "packed = alone": "in NF4, each document of a packed row has the hidden states that it has alone (1e-5)",
    "loss and gradient": "packed and recomputed, in fp32, those of transformers' own model with each document alone "
    "and the adapter in stock PEFT (1e-5), after the checks that each run makes of its head and blocks",
    "adapter in PEFT": "the adapter of a run in NF4, whose loss falls, gives our logits in transformers' model through "
    "stock PEFT (1e-5), of a wrapper in the whole wrapper",
    "resume": "a run resumed at its middle ends with the bytes of the uninterrupted one",
    "merge onto dequantized": "the merged model, loaded by transformers, gives the logits of what was trained (1e-4)",
    "merge onto base": "the merged model, loaded by transformers, gives those of the base with the adapter (1e-4)",
    "ddp": "two ranks have the losses and gradient norms of one process (1e-5)",
    "fsdp": "the same, sharded",
    "zero2": "the same, under DeepSpeed",
}
_KINDS = {
    "dense": "Dense models",
    "mixture": "Mixtures of experts",
    "wrapper": "Text models in a wrapper with towers for images",
}


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def proofs() -> str:
    """What each column says."""
    return "\n".join(f"- **{name}**: {words}." for name, words in PROOFS.items())


def supported() -> str:
    """A table for each kind of family, and the reasons of its cells that are not yes."""
    found = results()
    parts = [f"With transformers {found['transformers']}."]
    for kind, title in _KINDS.items():
        rows = {name: row["cells"] for name, row in found["families"].items() if row.get("kind") == kind}
        parts += [f"### {title}: {len(rows)}", *_table(rows)]
    return "\n\n".join(parts)


def _table(rows: dict[str, dict[str, str]]) -> list[str]:
    reasons: dict[str, int] = {}

    def shown(cell: str) -> str:
        word, _, reason = cell.partition(": ")
        return word if not reason else f"{word} ({reasons.setdefault(reason, len(reasons) + 1)})"

    lines = [(name, *(shown(cells.get(proof, "not run")) for proof in PROOFS)) for name, cells in rows.items()]
    notes = "\n".join(f"{number}. {prose(reason)}." for reason, number in reasons.items())
    return [table(("Family", *PROOFS), lines), *([notes] if notes else [])]


def refused() -> str:
    """Families by reason. Reasons that differ in the family's own name and parts are one, in the first one's words."""
    rows = {name: row["refused"] for name, row in results()["families"].items() if "refused" in row}
    groups: dict[str, list[str]] = {}
    for name, reason in rows.items():
        key = re.sub(rf"{re.escape(name)}\w*|\([^)]*\)|\d+", "", reason)
        groups.setdefault(key, []).append(name)
    ordered = sorted(groups.values(), key=lambda names: (-len(names), names))
    intro = f"{len(rows)} families. Where several share a reason, it is given in the words for the first."
    return "\n".join(
        [intro, "", *(f"- {', '.join(f'`{name}`' for name in names)}: {prose(rows[names[0]])}." for names in ordered)]
    )
