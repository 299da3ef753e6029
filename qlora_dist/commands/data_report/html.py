"""An audit as one self-contained HTML page: no scripts, no fonts, no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import os_errors
from ...files import write_text
from ...pages import Bar, BarChart, render
from .measure import Audit, Sample
from .terminal import COLUMNS


def write_html(audits: Sequence[Audit], file: str | Path) -> None:
    """Writes the page, and the folders above it."""
    page = render("data.html", title="Training data", columns=COLUMNS, audits=[_view(audit) for audit in audits])
    with os_errors(f"writing {file}"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(file), page)


def _view(audit: Audit) -> dict[str, Any]:
    lengths = [Bar(f"{low:,} - {high:,}", (count,), f"{count:,}") for low, high, count in audit.histogram]
    shares = [
        ("packed rows", audit.packed_share),
        (f"padded to the longest of {audit.micro_rows}", audit.padded_share),
        (f"padded to {audit.row_tokens:,}", audit.full_share),
    ]
    return {
        "name": audit.name,
        "warnings": audit.warnings,
        "sources": audit.sources,
        "num_rows": audit.num_rows,
        "row_tokens": audit.row_tokens,
        "lengths": BarChart("", "", lengths),
        "shares": BarChart("", "", [Bar(name, (share,), f"{share:.2%}") for name, share in shares], largest=1.0),
        "samples": [{"title": _title(sample), "runs": sample.runs} for sample in audit.samples],
    }


def _title(sample: Sample) -> str:
    return f"example {sample.index} of {sample.source}: {sample.num_tokens:,} tokens, {sample.num_labels:,} learned"
