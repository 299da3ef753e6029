"""Real samples that are not part of the repository: tests that need them are skipped without them."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("QLORA_DIST_SHARED", Path(__file__).parents[3] / "shared")) / "data"


def shared_file(name: str) -> Path:
    """Path of a real sample; skips the test with a reason if it is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real sample {path} is missing; set QLORA_DIST_SHARED to a folder whose data/ contains it")
    return path
