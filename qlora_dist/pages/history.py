"""history.jsonl of a run directory: one line for each start of the run and for each end, with its time and step.

A start without an end was killed, or its machine was lost, before it could write one, or it still runs.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LONGEST_TEXT = 20_000  # characters of one text of a line


def append_event(path: Path, event: str, **values: Any) -> None:
    """Adds a line; one that a crash cut short stays alone on its line. Raises OSError."""
    line = {"event": event, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), **values}
    short = {key: value[:LONGEST_TEXT] if isinstance(value, str) else value for key, value in line.items()}
    with open(path, "a+b") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(short).encode() + b"\n")  # once: two writers never share a line


def read_history(path: Path) -> list[dict[str, Any]]:
    """The events in their order; damaged lines are left out. Empty for a run of a version that wrote none."""
    if not path.is_file():
        return []
    found = []
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and event.get("event") in ("start", "end"):
                found.append(event)
    return found
