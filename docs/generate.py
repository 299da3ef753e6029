"""Writes the generated parts of these pages: `python -m docs.generate`, from the root of the repository.

A part stands between two comments that name it. What it says comes from the code that the program itself uses: the
config's schema, the commands' options, the memory plan, and `qlora-dist import`. A test compares the pages with it
(tests/test_docs).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from docs.parts.commands import commands, exit_codes
from docs.parts.config import config
from docs.parts.foreign import defaults, left_out, translated
from docs.parts.memory import fits_on_one, fits_sharded
from docs.parts.support import proofs, refused, supported
from qlora_dist.config.foreign.left_out import _NOT_HERE, _NOT_NEEDED
from qlora_dist.config.foreign.trainers import NAMES

DOCS = Path(__file__).parent
PARTS: dict[str, Callable[[], str]] = {
    "config": config,
    "commands": commands,
    "exit codes": exit_codes,
    "fits on one": fits_on_one,
    "fits sharded": fits_sharded,
    "proofs": proofs,
    "supported": supported,
    "refused": refused,
    "not needed": lambda: left_out(_NOT_NEEDED),
    "not here": lambda: left_out(_NOT_HERE),
    **{f"translated {name}": lambda name=name: translated(name) for name in NAMES},  # type: ignore[misc]
    **{f"defaults {name}": lambda name=name: defaults(name) for name in NAMES},  # type: ignore[misc]
}
_PART = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_parts(text: str) -> str:
    """A page with its generated parts as they are now."""
    return _PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]().strip()}\n\n{found[3]}", text)


def named_parts(text: str) -> list[str]:
    """The parts that a page has."""
    return [found[2] for found in _PART.finditer(text)]


def main() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = with_parts(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"docs/{page.relative_to(DOCS)}")


if __name__ == "__main__":
    main()
