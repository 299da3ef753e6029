"""`qlora-dist report`: the page of runs from their files. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config.run_dir import RunDir
from ..errors import UserError, os_errors
from ..files import format_bytes
from ..pages import holds_run, read_run, write_report
from .outputs import check_output_file


def report(runs: Sequence[str], out: str | None) -> str:
    """Writes the page and returns what to say of it. Raises UserError for what is no run directory."""
    paths = [run_directory(one) for one in runs]
    if out is None:
        if len(paths) > 1:
            raise UserError(f"{len(paths)} runs in one page: name the file to write, such as --out compared.html")
        out = str(RunDir(paths[0]).report)
        where = "this folder may be another user's: name another place with --out FILE"
    else:
        where = ""
    file = check_output_file("--out", out)
    with os_errors("reading the runs"):
        found = [read_run(path) for path in paths]
    with os_errors(f"writing {file}", where):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_report(found, file)
    return f"{file}: {format_bytes(file.stat().st_size)}, opens in any browser without a network"


def run_directory(name: str) -> Path:
    """Raises UserError for what is no run directory."""
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UserError(f"RUN {name}: there is no such folder; name a run directory (run_dir in its config)")
    if not holds_run(path):
        raise UserError(f"RUN {name}: holds no run (no config.yaml, no metrics.jsonl); name a run directory")
    return path
