"""Files and folders that are complete or absent: written aside, synced, renamed, and verified by a manifest.

The one home of atomic writes and of SHA-256 of files. Level 0: imports nothing from this package.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB, GIB = 2**20, 2**30
MANIFEST = "manifest.json"


class DamagedFolder(ValueError):
    """A folder that differs from what was written into it; the text says how."""


def format_bytes(size: float) -> str:
    """1.23 GiB, or 45.6 MiB below one."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# --- one file ---------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a crash, sees the old text or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes plain data as JSON, atomically. Non-finite numbers become null: JSON has none."""
    write_text(path, json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


# --- a folder ---------------------------------------------------------------------------------------------------------


@contextmanager
def folder_aside(target: Path, replaces: bool = True) -> Iterator[Path]:
    """A new folder to fill. When the block succeeds it takes the name `target`; when the block fails it is removed.

    `replaces`: the caller is the only writer of `target`, so that an older folder is replaced and leftovers of an
    interrupted write are removed first. Otherwise `target` must be absent or empty: raises OSError.
    """
    if replaces:
        remove_leftovers(target)
    aside = _aside(target)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(aside.stat().st_mode & 0o666)  # by the umask: safetensors and temporary files are 0600
            _sync(path)
        _sync(aside)
        if replaces and target.exists():
            replaced = _aside(target)
            os.rename(target, replaced)
            try:
                os.rename(aside, target)
            except BaseException:
                os.rename(replaced, target)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(aside, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Removes a folder. Renamed first, so that an interrupted deletion leaves no partial folder under its name."""
    doomed = _aside(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Removes the leftovers of an interrupted write or removal of a folder."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.incomplete*"):
        shutil.rmtree(path, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.incomplete-{uuid.uuid4().hex[:8]}")


def _sync(path: Path) -> None:
    """Makes a file, or a folder's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, head: dict[str, Any], is_hashed: bool = True) -> None:
    """Lists every file of a folder with its size and SHA-256. Written last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _describe(path, is_hashed) for path in paths}
    (folder / MANIFEST).write_text(json.dumps({**head, "files": files}, indent=2) + "\n", encoding="utf-8")


def _describe(path: Path, is_hashed: bool) -> dict[str, Any]:
    return {"bytes": path.stat().st_size} | ({"sha256": sha256(path)} if is_hashed else {})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest with its `files` by name. Raises DamagedFolder when it is missing or unreadable."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if "files" not in manifest and "bytes" in manifest:  # 4-bit copies made before version 0.2
            manifest["files"] = {name: {"bytes": size} for name, size in manifest["bytes"].items()}
        manifest["files"].items()
    except FileNotFoundError:
        raise DamagedFolder(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFolder(f"{MANIFEST} cannot be read ({error})") from None
    return manifest


def check_manifest(folder: Path, head: dict[str, Any], hash_limit: float = math.inf) -> None:
    """Raises DamagedFolder unless the manifest has the values of `head` and every file has its size and SHA-256.

    Files larger than `hash_limit` bytes are checked by size alone; -1: all of them.
    """
    manifest = read_manifest(folder)
    for key, expected in head.items():
        if manifest.get(key) != expected:
            raise DamagedFolder(f"{key} {manifest.get(key)!r}, this version reads {expected}")
    for name, written in manifest["files"].items():
        try:
            size, expected = (folder / name).stat().st_size, written["bytes"]
            digest = written["sha256"] if size <= hash_limit else None
        except OSError:
            raise DamagedFolder(f"{name} is missing") from None
        except (KeyError, TypeError):
            raise DamagedFolder(f"{MANIFEST} cannot be read (its entry for {name} is {written!r})") from None
        if size != expected:
            raise DamagedFolder(f"{name} has {size:,} bytes, {expected:,} were written")
        if digest is not None and sha256(folder / name) != digest:
            raise DamagedFolder(f"{name} is damaged: its SHA-256 is not the one that was written")


def is_whole(folder: Path, head: dict[str, Any], hash_limit: float = math.inf) -> bool:
    """Whether a folder exists and is intact, see `check_manifest`."""
    try:
        check_manifest(folder, head, hash_limit)
    except (DamagedFolder, OSError):
        return False
    return True
