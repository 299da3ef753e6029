"""What determines a result besides the config: versions, commit, machine. Part of every summary."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__


def device_name(device: torch.device) -> str:
    """The GPU's name, or the machine's processor kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of the libraries that determine the results."""
    names = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets")
    found = {name: _version(name) for name in names}
    return {"qlora_dist": __version__, "python": platform.python_version(), **found}


@functools.cache
def _version(name: str) -> str:
    """Parsing a package's metadata takes ten milliseconds, and a run asks several times."""
    return metadata.version(name)


@functools.cache
def commit() -> str | None:
    """Commit of the package's checkout, with `-dirty` when files differ from it; None outside of a checkout.

    As it was when this process asked first: it goes on with the code that it has, whatever becomes of the files.
    """
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", str(folder.parent)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def code_digest() -> str:
    """SHA-256 of the package's source files on this host, 12 digits: differs wherever the code differs. As `commit`, it
    is that of the first time it is asked."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
