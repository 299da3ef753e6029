"""The CUDA allocator's peak against the memory plan, over a grid of shapes and settings, on the null device.

    .venv/bin/python -m benchmarks.null.plan --out benchmarks/results/null

Each point is three training steps with PyTorch's own CUDA allocator. `plan_error` is (plan - peak) / peak, with the
peak that torch.cuda.max_memory_allocated gives for the steps. The file is written after each point, and points that it
already has for the same code are not run again; with --keep, peaks that an earlier commit measured are kept, with that
commit's name, and compared with the plan of now.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from qlora_dist.config import parse_config
from qlora_dist.errors import UserError
from qlora_dist.memory import plan_memory, shapes_from_config

from .. import provenance
from ..shapes import config_json, shape_of
from .steps import Point, against_plan, measure

# Every value of every setting occurs, every shape once at full depth; few layers where only the working set matters
GRID = (
    Point("1b", 512, "none"),
    Point("1b", 1024, "half", rank=64, optimizer="paged_adamw_32bit"),
    Point("1b", 2048, "full", optimizer="adamw_8bit"),
    Point("1b", 4096, "none", rank=64, optimizer="paged_adamw_8bit"),
    Point("1b", 4096, "full", offload=True),
    Point("1b", 2048, "none", micro_rows=4),
    Point("8b", 512, "full", rank=64, optimizer="paged_adamw_32bit"),
    Point("8b", 2048, "none", micro_rows=4),
    Point("8b", 2048, "full", micro_rows=4),
    Point("8b", 4096, "half", optimizer="adamw_8bit"),
    Point("8b", 2048, "full", rank=64, offload=True),
    Point("8b", 1024, "none", offload=True),
    Point("8b", 4096, "full", rank=64, optimizer="paged_adamw_8bit"),
    Point("13b", 2048, "none"),
    Point("13b", 512, "full", rank=64, optimizer="paged_adamw_32bit"),
    Point("13b", 4096, "half", layers=10, rank=64),
    Point("13b", 1024, "none", layers=10, rank=64, optimizer="adamw_8bit"),
    Point("13b", 4096, "full", layers=10, offload=True),
    Point("65b", 512, "full", rank=64, optimizer="paged_adamw_32bit"),
    Point("65b", 2048, "none", layers=10, rank=64),
    Point("65b", 4096, "half", layers=10, optimizer="paged_adamw_8bit"),
    Point("65b", 1024, "full", layers=10, rank=64, optimizer="adamw_8bit", offload=True),
    Point("70b", 2048, "full", optimizer="paged_adamw_32bit"),
    Point("70b", 4096, "none", layers=8),
    Point("13b", 2048, "none", layers=10, offload=True),
    Point("8b", 4096, "half", layers=8, offload=True),
    Point("65b", 2048, "none", layers=10, offload=True),
    Point("70b", 512, "full", layers=8, rank=64, optimizer="paged_adamw_8bit", offload=True),
    Point("70b", 1024, "half", layers=8, rank=64, micro_rows=2),
)


def measured(points: tuple[Point, ...], out: Path, work: Path, keep: bool = False) -> list[dict[str, Any]]:
    """All points, kept in `out` as they are found. Raises UserError for a point that fails."""
    found = _earlier(points, out, keep)
    for one in measure([point for point in points if point.name not in found], work):
        found[one["name"]] = one | {"commit": one["provenance"]["commit"]}
        _write(out, [found[point.name] for point in points if point.name in found], one["provenance"])
        print(f"{one['plan_error']:+.2%}  {one['peak_bytes'] / 2**30:7.3f} GiB  {one['name']}", flush=True)
    return [found[point.name] for point in points]


def planned_again(point: Point, one: dict[str, Any]) -> dict[str, Any]:
    """A measured point with the plan of now."""
    shapes = shapes_from_config(config_json(shape_of(point.shape, point.layers)))
    assert shapes is not None
    config = parse_config(point.config(Path("unused")))
    return one | against_plan(plan_memory(config, shapes, world_size=1, device_bytes=None), one["peak_bytes"])


def _earlier(points: tuple[Point, ...], out: Path, keep: bool) -> dict[str, dict[str, Any]]:
    if not out.exists():
        return {}
    content = json.loads(out.read_text())
    known = {one["name"]: one for one in content["points"]}
    if not keep and content["provenance"]["code_hash"] != provenance.code_hash():
        return {}
    found = {point.name: planned_again(point, known[point.name]) for point in points if point.name in known}
    if found:
        # the plan's commit; each point names the one that measured it
        now = {"commit": provenance.commit(), "code_hash": provenance.code_hash()}
        _write(out, list(found.values()), content["provenance"] | now)
    return found


def _write(out: Path, points: list[dict[str, Any]], newest: dict[str, Any]) -> None:
    origin = newest | {"command": provenance.this_command("benchmarks.null.plan")}
    largest = max(points, key=lambda one: abs(one["plan_error"]))
    content = {
        "benchmark": "null_plan",
        "provenance": origin,
        "largest_error": largest["plan_error"],
        "largest_error_at": largest["name"],
        "points": [{key: value for key, value in one.items() if key != "provenance"} for one in points],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=provenance.ROOT / "benchmarks" / "results" / "null")
    parser.add_argument("--only", default="", help="Points whose name contains this.")
    parser.add_argument("--keep", action="store_true", help="Keep points of earlier commits whose plan is the same.")
    parser.add_argument("--work", type=Path, help="Folder for the inputs (default: a temporary one).")
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    points = tuple(point for point in GRID if arguments.only in point.name)
    try:
        provenance.require_clean(arguments.allow_dirty)
        with tempfile.TemporaryDirectory(prefix="null-plan-") as folder:
            measured(points, arguments.out / "plan.json", arguments.work or Path(folder), arguments.keep)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
