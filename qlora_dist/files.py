"""Files and folders that are complete or absent: written aside, synced, renamed, and verified by a manifest.

The one home of atomic writes and of SHA-256 of files. Level 0: imports nothing from this package.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import pwd
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

MIB, GIB = 2**20, 2**30
MANIFEST = "manifest.json"
HASH_THREADS = min(8, os.cpu_count() or 1)  # one core hashes 0.5 to 2 GB/s, and lets other threads run meanwhile


Hashing = Literal["all", "recorded", "none"]


class DamagedFolder(ValueError):
    """A folder that differs from what was written into it; the text says how."""


def format_bytes(size: float) -> str:
    """A size for people: 1.23 GiB, 45.6 MiB, 12.3 KiB."""
    unit, name = next((one for one in ((GIB, "GiB"), (MIB, "MiB")) if abs(size) >= one[0]), (1024, "KiB"))
    return f"{size / unit:.{2 if name == 'GiB' else 1}f} {name}"


# --- digests ----------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def digests(paths: Sequence[Path], *, believes: Literal["none", "own", "all"] = "all") -> list[str]:
    """SHA-256 of whole files, read in parallel; of those that are as they were when last hashed, the one recorded then.

    `believes`: whose files the record is used for: nobody's, this user's, everybody's. Raises OSError.
    """
    record = _Record.read()

    def digest_of(path: Path) -> str:
        status = path.stat()
        is_believed = believes == "all" or (believes == "own" and status.st_uid == os.getuid())
        known = record.get(status) if is_believed else None
        if known is None:
            started, known = time.time(), sha256(path)
            # a file changed less than two seconds ago may change again within the resolution of its time stamps
            if started - max(status.st_mtime, status.st_ctime) > 2.0:
                record.add(status, known)
        return known

    with ThreadPoolExecutor(HASH_THREADS) as threads:
        found = list(threads.map(digest_of, paths))
    record.write()
    return found


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _Record:
    """Digests of files by identity, in a file that only this user can write: ~/.cache/qlora_dist/verified.json.

    Whatever is wrong with it, or with the disk that holds it, files are only hashed once more.
    """

    _LIMIT = 5_000  # files

    def __init__(self, path: Path, known: dict[str, str]) -> None:
        self._path = path
        self._known = known
        self._added: dict[str, str] = {}

    @classmethod
    def read(cls) -> _Record:
        path = Path(os.path.expanduser("~/.cache/qlora_dist/verified.json"))
        return cls(path, cls._load(path) if path.is_absolute() else {})  # a user may have no home

    @staticmethod
    def _load(path: Path) -> dict[str, str]:
        try:
            # not a link, not a pipe, and written by nobody else
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                    return {}
                known = json.load(file)
        except (OSError, ValueError, RecursionError):
            return {}
        is_sound = isinstance(known, dict) and all(isinstance(digest, str) for digest in known.values())
        return known if is_sound else {}

    @staticmethod
    def _key(status: os.stat_result) -> str:
        # by host: once per node, whose device numbers mean nothing on another one
        return " ".join(map(str, (os.uname().nodename, *identity(status))))

    def get(self, status: os.stat_result) -> str | None:
        return self._known.get(self._key(status))

    def add(self, status: os.stat_result, digest: str) -> None:
        self._added[self._key(status)] = digest

    def write(self) -> None:
        if not self._added or not self._path.is_absolute():
            return
        known = {**self._load(self._path), **self._added}  # with what other processes have added since
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(dict(list(known.items())[-self._LIMIT :])), mode=0o600)


# --- one file ---------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Replaces a file so that a reader, or a crash, sees the old text or the new one, never half of it.

    `mode`: permissions, before the umask.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
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

    `replaces`: the caller is the only writer of `target`, so that an older folder is replaced and all leftovers of an
    interrupted write are removed first. Otherwise only those whose writer has ended, and `target` must be absent or
    empty: raises OSError.
    """
    remove_leftovers(target, is_only_writer=replaces)
    aside, lock = _new_aside(target)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            if not path.is_symlink():
                _settle_mode(path, aside)
                _sync(path)
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
    finally:
        os.close(lock)


def _settle_mode(path: Path, aside: Path) -> None:
    """Readable as the umask says (safetensors and temporary files are 0600), and never writable by every user."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        path.chmod(aside.stat().st_mode & 0o664)
    elif mode & stat.S_IWOTH:
        path.chmod(stat.S_IMODE(mode) & ~stat.S_IWOTH)


def remove_folder(folder: Path) -> None:
    """Removes a folder, or what stands in its place. Renamed first: an interrupted deletion leaves nothing partial."""
    doomed = _aside(folder)
    os.rename(folder, doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink()


def remove_leftovers(target: Path, is_only_writer: bool = True) -> None:
    """Removes the leftovers of interrupted writes and removals of a folder.

    Beside other writers, only those that certainly have none: their lock is free, and they were made on this host (not
    every file system shares its locks between hosts) or have not changed for a day.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.incomplete*"):
        if is_only_writer or _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(aside: Path) -> bool:
    try:
        descriptor = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if f"-{_host()}-" in aside.name:
            return True
        return time.time() - max(path.lstat().st_mtime for path in (aside, *aside.rglob("*"))) > 86_400
    except OSError:  # its writer is at work, or this file system has no locks
        return False
    finally:
        os.close(descriptor)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.incomplete-{_host()}-{uuid.uuid4().hex[:8]}")


def _host() -> str:
    return os.uname().nodename[:64].replace("/", "_")


def _new_aside(target: Path) -> tuple[Path, int]:
    """A new folder beside `target`, and a descriptor that holds its lock while its writer lives."""
    while True:
        aside = _aside(target)
        aside.mkdir(parents=True)
        descriptor = os.open(aside, os.O_RDONLY)
        with contextlib.suppress(OSError):  # without locks nobody takes it for abandoned
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if aside.exists():  # nobody removed it before it was locked
            return aside, descriptor
        os.close(descriptor)


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


def write_manifest(folder: Path, head: dict[str, Any]) -> None:
    """Lists every file of a folder with its size and SHA-256. Written last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        hashed = list(threads.map(sha256, paths))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashed)
    }
    (folder / MANIFEST).write_text(json.dumps({**head, "files": files}, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest with its `files` by name. Raises DamagedFolder when it is missing, unreadable or of another form."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if "files" not in manifest and "bytes" in manifest:  # 4-bit copies made before version 0.2
            manifest["files"] = {name: {"bytes": size} for name, size in manifest["bytes"].items()}
        manifest["files"].items()
    except FileNotFoundError:
        raise DamagedFolder(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFolder(f"{MANIFEST} cannot be read ({error})") from None
    return manifest


def check_manifest(
    folder: Path, head: dict[str, Any], *, hashing: Hashing = "all", required: Iterable[str] | None = None
) -> None:
    """Raises DamagedFolder unless the manifest has the values of `head` and every file has its size and SHA-256.

    `hashing`: "recorded" takes the digests of this user's files from the record while they are unchanged, see
    `digests`; "none" compares sizes alone. `required`: names that the manifest must list; the folder must then hold
    just what is listed, as regular files (names that begin with a dot are the file system's).
    """
    manifest = read_manifest(folder)
    for key, expected in head.items():
        if manifest.get(key) != expected:
            raise DamagedFolder(f"{key} {manifest.get(key)!r:.100}, this version reads {expected}")
    if required is not None:
        _check_names(folder, set(manifest["files"]), set(required))
    paths = [_checked_size(folder, name, entry, hashing) for name, entry in manifest["files"].items()]
    if hashing != "none":
        try:
            found = digests(paths, believes="own" if hashing == "recorded" else "none")
        except OSError as error:
            raise DamagedFolder(f"cannot be read ({error})") from None
        for path, digest in zip(paths, found):
            name = path.relative_to(folder).as_posix()
            if digest != manifest["files"][name]["sha256"]:
                raise DamagedFolder(f"{name} is damaged: its SHA-256 is not the one that was written")


def _checked_size(folder: Path, name: str, entry: Any, hashing: Hashing) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts or Path(name).as_posix() != name:
        raise DamagedFolder(f"{MANIFEST} cannot be read (it lists {name!r:.100})")
    try:
        status = (folder / name).stat()
    except (OSError, ValueError):
        raise DamagedFolder(f"{name:.100} is missing") from None
    is_sound = isinstance(entry, dict) and isinstance(entry.get("bytes"), int)
    if not is_sound or (hashing != "none" and not isinstance(entry.get("sha256"), str)):
        raise DamagedFolder(f"{MANIFEST} cannot be read (its entry for {name} is {entry!r:.100})")
    if not stat.S_ISREG(status.st_mode):  # a pipe would be read for ever
        raise DamagedFolder(f"{name} is not a file")
    if status.st_size != entry["bytes"]:
        raise DamagedFolder(f"{name} has {status.st_size:,} bytes, {entry['bytes']:,} were written")
    return folder / name


def _check_names(folder: Path, listed: set[str], required: set[str]) -> None:
    if missing := required - listed:
        raise DamagedFolder(f"{MANIFEST} does not list {', '.join(sorted(missing))}")
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.name.startswith(".") and (not path.is_dir() or path.is_symlink())
    } - {MANIFEST}
    if unlisted := found - listed:
        raise DamagedFolder(f"{MANIFEST} does not list {', '.join(sorted(unlisted)):.200}")


def is_whole(folder: Path, head: dict[str, Any], **options: Any) -> bool:
    """Whether a folder exists and is intact, see `check_manifest`."""
    try:
        check_manifest(folder, head, **options)
    except (DamagedFolder, OSError):
        return False
    return True


def other_writers(folder: Path) -> str:
    """Who else could have written what is in a folder: another owner than this user and root, or everybody; else ''."""
    found = set()
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_uid not in (os.getuid(), 0):
                found.add(f"user {_user(status.st_uid)} owns it")
            if status.st_mode & stat.S_IWOTH:
                found.add("every user may write to it")
    return ", ".join(sorted(found))


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
