"""An audit as one self-contained HTML page: no scripts, no fonts, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ...errors import os_errors, printable
from ...files import write_text
from .measure import Audit, Sample
from .terminal import COLUMNS

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .6rem; border-bottom: 1px solid #8886; }
th { text-align: left; } .n { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; word-break: break-word; padding: .8rem; border: 1px solid #8886; border-radius: 6px; }
.context { opacity: .6; } .label { background: #3a53; } .special { outline: 1px solid #c60; border-radius: 3px; }
.warning { border-left: 4px solid #c80; padding-left: .6rem; } svg text { font: 12px sans-serif; fill: currentColor; }
"""


def write_html(audits: Sequence[Audit], file: str | Path) -> None:
    """Writes the page, and the folders above it."""
    sections = "".join(_section(audit) for audit in audits)
    page = (
        "<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>Training data</title>"
        f"<style>{_STYLE}</style><h1>Training data</h1>{sections}</html>\n"
    )
    with os_errors(f"writing {file}"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(file), page)


def _shown(text: str) -> str:
    """Text from outside without tags, and without what HTML cannot hold (NUL, lone surrogates) or would obey."""
    return escape(printable(text))


def _section(audit: Audit) -> str:
    shares = [
        ("packed rows", audit.packed_share),
        (f"padded to the longest of {audit.micro_rows}", audit.padded_share),
        (f"padded to {audit.row_tokens:,}", audit.full_share),
    ]
    histogram = [(f"{low:,} - {high:,}", count, f"{count:,}") for low, high, count in audit.histogram]
    warnings = "".join(f"<p class='warning'>{_shown(warning)}</p>" for warning in audit.warnings)
    return (
        f"<h2>{_shown(audit.name)}</h2>{warnings}{_sources(audit)}"
        f"<h3>Tokens per document</h3>{_bars(histogram)}"
        f"<h3>Slots that hold a token</h3><p>{audit.num_rows:,} rows of {audit.row_tokens:,} tokens</p>"
        f"{_bars([(name, share, f'{share:.2%}') for name, share in shares], largest=1.0)}"
        "<h3>Samples</h3><p><span class='label'>learned</span>, <span class='context'>context</span>, "
        f"<span class='special'>special token</span></p>{''.join(map(_sample, audit.samples))}"
    )


def _sources(audit: Audit) -> str:
    head = "".join(f"<th class='n'>{column}</th>" for column in COLUMNS)
    body = ""
    for source in audit.sources:
        names = (source.path, f"{source.format} ({source.why})", source.template)
        cells = "".join(f"<td>{_shown(name)}</td>" for name in names)
        cells += "".join(f"<td class='n'>{getattr(source, column):,}</td>" for column in COLUMNS)
        body += f"<tr>{cells}</tr>"
    return f"<table><tr><th>source</th><th>format</th><th>template</th>{head}</tr>{body}</table>"


def _bars(rows: Sequence[tuple[str, float, str]], largest: float | None = None) -> str:
    """A horizontal bar chart as inline SVG."""
    top = largest or max(value for _, value, _ in rows) or 1
    lines = "".join(
        f"<text x='190' y='{20 * i + 14}' text-anchor='end'>{_shown(name)}</text>"
        f"<rect x='200' y='{20 * i + 3}' width='{400 * value / top:.1f}' height='14' fill='#2a7fbf'/>"
        f"<text x='{206 + 400 * value / top:.1f}' y='{20 * i + 14}'>{_shown(label)}</text>"
        for i, (name, value, label) in enumerate(rows)
    )
    return f"<svg role='img' width='700' height='{20 * len(rows) + 4}'>{lines}</svg>"


def _sample(sample: Sample) -> str:
    runs = "".join(
        f"<span class='{'label' if run.is_label else 'context'}{' special' if run.is_special else ''}'>"
        f"{_shown(run.text)}</span>"
        for run in sample.runs
    )
    title = f"example {sample.index} of {sample.source}: {sample.num_tokens:,} tokens, {sample.num_labels:,} learned"
    return f"<p>{_shown(title)}</p><pre>{runs}</pre>"
