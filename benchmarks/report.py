"""Raw JSON -> benchmarks/RESULTS.md and one HTML page that needs no network.

    python -m benchmarks.report [--results benchmarks/results] [--out benchmarks]

Every table names the raw file of each of its rows, and no number stands here that is not in one of them. A raw file
without its provenance is refused.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_dist.errors import UserError

from . import sections
from .provenance import FIELDS, ROOT

LEAST_FIELDS = ("commit", "command", "date", "versions")
STYLE = """
body{font-family:system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;line-height:1.45;
color:#1a1a1a;background:#fff}
table{border-collapse:collapse;font-size:14px;margin:1em 0;display:block;overflow-x:auto}
th,td{border-bottom:1px solid #8885;padding:3px 9px;text-align:left;white-space:nowrap}
td.number{text-align:right;font-variant-numeric:tabular-nums}
svg{max-width:100%;height:auto;margin:.6em 0}code{font-size:90%}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}a{color:#8ab4f8}}
"""


@dataclass
class Raw:
    """Everything that was measured under one folder of results (cpu, or a GPU's name)."""

    name: str
    cells: list[dict[str, Any]] = field(default_factory=list)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)  # stem -> quantization, packing, ceilings, ...
    paths: dict[str, str] = field(default_factory=dict)  # cell name or stem -> path below benchmarks/


def read_results(folder: Path) -> list[Raw]:
    """All raw files, by device folder. Raises UserError for a file whose origin is not known."""
    found = []
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        raw = Raw(device.name)
        for path in sorted(device.rglob("*.json")):
            content = json.loads(path.read_text())
            origin = content.get("provenance", content)
            # benchmarks of one machine part alone keep their origin at the top, with fewer fields
            needed = FIELDS if "provenance" in content or "cell" in content else LEAST_FIELDS
            lacking = [name for name in needed if name not in origin]
            if lacking:
                raise UserError(f"{path}: no {', '.join(lacking)}; a number without its origin is not reported")
            relative = str(path.relative_to(folder.parent))
            if "cell" in content:
                raw.cells.append(content)
                raw.paths[content["name"]] = relative
            else:
                raw.others[path.stem] = content
                raw.paths[path.stem] = relative
        if raw.cells or raw.others:
            found.append(raw)
    return found


def build(results: Path) -> list[sections.Section]:
    """The parts of the report, in order."""
    parts = []
    for raw in read_results(results):
        for make in sections.ALL:
            section = make(raw)
            if section is not None:
                parts.append(section)
    return parts


def to_markdown(parts: list[sections.Section]) -> str:
    lines = ["# Results", "", INTRODUCTION, ""]
    for part in parts:
        lines += [f"## {part.title}", "", *([part.text, ""] if part.text else [])]
        for table in part.tables:
            lines += [f"**{table.title}**", ""] if table.title else []
            lines += ["| " + " | ".join(table.header) + " |", "|" + "---|" * len(table.header)]
            lines += ["| " + " | ".join(_cell_markdown(value) for value in row) + " |" for row in table.rows]
            lines += [""]
    return "\n".join(lines)


INTRODUCTION = (
    "Made by `python -m benchmarks.report` from the raw files that each row names; do not edit. Tokens are real tokens "
    "(padding is not counted), rates are medians over the timed steps with quartiles in brackets. Memory is the peak "
    "of the training steps: on a CPU (where freed blocks of 1 MiB and more go back to the system, in every cell alike) "
    "the anonymous resident memory above what interpreter and libraries took before "
    "the model was read (the absolute figure stands beside it), on a GPU what the allocator gave out."
)


def to_html(parts: list[sections.Section]) -> str:
    body = [f"<h1>Results of qlora_dist</h1><p>{_inline(INTRODUCTION)}</p>"]
    for part in parts:
        body.append(f"<h2>{html.escape(part.title)}</h2>")
        body += [f"<p>{_inline(part.text)}</p>"] if part.text else []
        body += part.charts
        for table in part.tables:
            body.append(f"<h3>{html.escape(table.title)}</h3>" if table.title else "")
            head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
            rows = "".join("<tr>" + "".join(map(_cell_html, row)) + "</tr>" for row in table.rows)
            body.append(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Results of qlora_dist</title>'
        '<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _cell_markdown(value: Any) -> str:
    if isinstance(value, sections.Link):
        return f"[{value.text}]({value.path})"
    return sections.shown(value).replace("|", "\\|")


def _cell_html(value: Any) -> str:
    if isinstance(value, sections.Link):
        return f'<td><a href="{html.escape(value.path)}">{html.escape(value.text)}</a></td>'
    kind = ' class="number"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"<td{kind}>{html.escape(sections.shown(value))}</td>"


def _inline(text: str) -> str:
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    arguments = parser.parse_args()
    try:
        parts = build(arguments.results)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    (arguments.out / "RESULTS.md").write_text(to_markdown(parts))
    (arguments.out / "results.html").write_text(to_html(parts))
    print(f"{arguments.out / 'RESULTS.md'} and results.html: {len(parts)} sections")


if __name__ == "__main__":
    main()
