"""An audit on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .measure import Audit, Sample

COLUMNS = ("records", "examples", "tokens", "labels", "truncated", "dropped", "bad", "duplicates")


def print_audit(audit: Audit, console: Console) -> None:
    """Sources, lengths, packing, warnings and samples, in this order."""
    console.rule(audit.name)
    console.print(_source_table(audit))
    console.print(_histogram(audit))
    console.print(
        f"packing: {audit.num_rows:,} rows of {audit.row_tokens:,} tokens, {audit.packed_share:.2%} full; padded to "
        f"the longest of {audit.micro_rows} documents it would be {audit.padded_share:.1%}, padded to row_tokens "
        f"{audit.full_share:.1%}",
        highlight=False,
    )
    for warning in audit.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    for sample in audit.samples:
        console.print(_sample(sample))


def _source_table(audit: Audit) -> Table:
    table = Table()
    for column in ("source", "format", "template"):
        table.add_column(column, overflow="fold")
    for column in (*COLUMNS, "label share"):
        table.add_column(column, justify="right")
    for source in audit.sources:
        share = f"{source.labels / max(1, source.tokens):.1%}"
        numbers = [f"{getattr(source, column):,}" for column in COLUMNS]
        table.add_row(Text(source.path), f"{source.format} ({source.why})", source.template, *numbers, share)
    return table


def _histogram(audit: Audit, width: int = 50) -> Text:
    largest = max(count for _, _, count in audit.histogram)
    lines = Text("tokens of a document\n")
    for low, high, count in audit.histogram:
        bar = "█" * -(-count * width // largest)
        lines.append(f"{low:>7,} - {high:<7,} ").append(f"{bar:<{width}}", style="cyan").append(f" {count:,}\n")
    return lines


def _sample(sample: Sample) -> Text:
    text = Text(
        f"\nexample {sample.index} of {sample.source}: {sample.num_tokens:,} tokens, {sample.num_labels:,} learned\n",
        style="bold",
    )
    for run in sample.runs:
        # learned text is green, context dim; special tokens are shown reversed
        style = "green" if run.is_label else "dim"
        text.append(run.text, style=f"not bold {style}{' reverse' if run.is_special else ''}")
    return text.append("\n")
