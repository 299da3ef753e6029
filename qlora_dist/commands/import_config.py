"""`qlora-dist import`: a config of another trainer -> one of this package, and a report on every key."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.foreign.translate import report, translate_file
from ..files import write_text
from .screen import write_data


def run_import(path: str, target: Path | None, *, trainer: str | None, gpus: int, overrides: Sequence[str]) -> None:
    """Writes the config to `target`, or to stdout; the report goes to stdout, or beside the config to stderr."""
    translation = translate_file(path, trainer=trainer, gpus=gpus, overrides=overrides)
    lines, text = report(translation), translation.text(path)
    if target is None:
        print("\n".join(lines), file=sys.stderr)
        write_data(text)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    print("\n".join([*lines, "", f"Written to {target}. Next: qlora-dist data {target}, qlora-dist plan {target}"]))
