"""Files that come with the package but are not Python: in the checkout that contains it, else installed beside it."""

from __future__ import annotations

import sys
from pathlib import Path


def shipped_folders(name: str) -> tuple[Path, Path]:
    """Where a folder of them may be, such as ds_configs: in a checkout, or where pip installs it."""
    return Path(__file__).parents[2] / name, Path(sys.prefix) / "share" / "qlora_dist" / name


def shipped_files(name: str, pattern: str) -> list[Path]:
    """The files of that folder, sorted; none if the package was installed without them."""
    for folder in shipped_folders(name):
        if found := sorted(folder.glob(pattern)):
            return found
    return []
