"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(one) for one in row)} |" for row in rows)])


def code(text: str) -> str:
    """Text as it is typed. HTML's form of a code span where Markdown's would end a cell or itself."""
    if "|" in text or "`" in text:
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
        return f"<code>{text}</code>"
    return f"`{text}`"


def prose(text: str) -> str:
    """A description from the code: its code spans stay, what would be emphasis or HTML is shown as it is."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(text: str) -> str:
    for sign in "\\*_<[":
        text = text.replace(sign, "\\" + sign)
    return text


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "&#124;").split())
