"""Real samples that are not part of the repository: tests that want them are skipped where they are absent."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("QLORA_DIST_SHARED", Path(__file__).parents[3] / "shared")) / "data"


def shared_file(name: str) -> Path:
    """Path of a real sample; skips the test, saying why, where it is not there."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real sample {path} is absent; set QLORA_DIST_SHARED to a folder whose data/ holds it")
    return path
