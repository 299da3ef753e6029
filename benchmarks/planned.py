"""Planned memory by item for the paper's model sizes: its Figure 6 with the real LLaMA shapes.

    python -m benchmarks.planned --out benchmarks/results/cpu/planned.json

Nothing is measured here: the file holds what `qlora-dist plan` computes from the shapes, for the report's chart.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from qlora_dist.errors import UserError

from . import inputs, provenance
from .cells import Cell

SIZES = ("7b", "13b", "33b", "65b")
METHODS = ("nf4-dq", "nf4", "lora-bf16", "full-bf16")
TEXT = (
    "Batch 1 x 512 tokens, adapters of rank 64 on all linear layers, every layer recomputed, as in the paper's figure, "
    "with the real LLaMA shapes and the fp32 adapters that this package trains. Planned, not measured."
)


GROUPS = {
    # the categories of the paper's figure, from the plan's finer items
    "base": ("base", "quantization constants", "embeddings, head, norms", "weights"),
    "adapters": ("adapters",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "outside of tensors": ("CUDA context", "NCCL", "allocator reserve", "cuBLAS workspace"),
}
TRANSIENT = "activations and work space"  # everything else: what exists only at the peak of a step


def grouped(items: dict[str, int]) -> dict[str, int]:
    """The plan's items in the figure's groups; the total is unchanged."""
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    found = dict.fromkeys((*GROUPS, TRANSIENT), 0)
    for name, size in items.items():
        found[group_of.get(name, TRANSIENT)] += size
    return found


def plans() -> list[dict[str, Any]]:
    """One entry for each size and method."""
    found = []
    for shape in SIZES:
        for method in METHODS:
            cell = Cell("ours", method, shape, 512, rank=64)
            plan = inputs.planned(cell, Path("."))
            if plan is None or "error" in plan:
                raise UserError(
                    f"{shape} {method}: no plan ({(plan or {}).get('error', 'qlora_dist.memory is absent')})"
                )
            found.append(
                {"shape": shape, "method": method, "groups": grouped(plan["items"]), "peak_bytes": plan["peak_bytes"],
                 "plan": plan}
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    try:
        provenance.require_clean(arguments.allow_dirty)
        results = plans()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    origin = provenance.collect(provenance.this_command("benchmarks.planned"), torch.device("cpu"))
    content = {
        "benchmark": "planned",
        "provenance": origin,
        "text": TEXT,
        "order": [*GROUPS, TRANSIENT],
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
