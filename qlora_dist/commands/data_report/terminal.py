"""An audit on a terminal. All text from data and names passes `printable` before it is coloured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...errors import printable
from .measure import Audit, Sample

COLUMNS = ("records", "examples", "tokens", "labels", "truncated", "dropped", "bad", "duplicates")
_HEADS = {"truncated": "trun-\ncated", "duplicates": "dupli-\ncates"}  # ten columns of millions fit into 80 characters


def print_audit(audit: Audit, console: Console) -> None:
    """Prints sources, lengths, packing, warnings and samples, in this order."""
    console.rule(audit.name)
    _print_sources(audit, console)
    console.print(_histogram(audit))
    console.print(
        f"packing: {audit.num_rows:,} rows of {audit.row_tokens:,} tokens, {audit.packed_share:.2%} full; padding to "
        f"the longest of {audit.micro_rows} documents would give {audit.padded_share:.1%}, padding to row_tokens "
        f"{audit.full_share:.1%}",
        highlight=False,
    )
    for warning in audit.warnings:
        console.print(Text(printable(f"warning: {warning}"), style="yellow"))
    for sample in audit.samples:
        console.print(_sample(sample))


def _print_sources(audit: Audit, console: Console) -> None:
    """Each source's name on a separate line, as paths are long; its numbers in a table below, by source number."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in ("", *(_HEADS.get(column, column) for column in COLUMNS), "label\nshare"):
        table.add_column(head, justify="right", no_wrap=True)
    for number, source in enumerate(audit.sources, 1):
        text = f"{number}  {source.path}: format {source.format} ({source.why}), template {source.template}"
        console.print(Text(printable(text)))
        share = f"{source.labels / max(1, source.tokens):.1%}"
        table.add_row(str(number), *(f"{getattr(source, column):,}" for column in COLUMNS), share)
    console.print()
    console.print(table)
    console.print()


def _histogram(audit: Audit, width: int = 50) -> Text:
    largest = max(count for _, _, count in audit.histogram)
    lines = Text("tokens per document\n")
    for low, high, count in audit.histogram:
        bar = "█" * -(-count * width // largest)
        lines.append(f"{low:>7,} - {high:<7,} ").append(f"{bar:<{width}}", style="cyan").append(f" {count:,}\n")
    return lines


def _sample(sample: Sample) -> Text:
    title = f"example {sample.index} of {sample.source}: {sample.num_tokens:,} tokens, {sample.num_labels:,} learned"
    text = Text(f"\n{printable(title)}\n", style="bold")
    for run in sample.runs:
        # learned text is green, context dim; special tokens are shown reversed
        style = "green" if run.is_label else "dim"
        text.append(printable(run.text), style=f"not bold {style}{' reverse' if run.is_special else ''}")
    return text.append("\n")
