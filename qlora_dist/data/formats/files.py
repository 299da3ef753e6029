"""Where records come from: files, folders of files, and the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from .readers import READERS, RawRecord, plain_value

# split names of folders and hub datasets -> the three names used here
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}


def is_local(path: str) -> bool:
    """Whether a source path is local, not the name of a hub dataset.

    `org/name` is a hub name unless it exists as a path; anything with a known suffix or a leading dot, slash or
    tilde is local.
    """
    suffixes = tuple(READERS)
    return Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or path.endswith(suffixes)


def find_files(path: str, split: str | None = None) -> list[Path]:
    """The files of a local source, sorted. Of a folder, those of `split` (default: train)."""
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"data source {path}: no such file or folder (working directory {Path.cwd()})")
    if root.is_file():
        if root.suffix not in READERS:
            raise UserError(
                f"data source {path}: unknown file type {root.suffix or '(no suffix)'}; expected one of "
                f"{', '.join(READERS)}"
            )
        return [root]
    found = _files_below(root)
    files = [file for file in found if _split_of(file, root) == _SPLITS.get(split or "train", split)]
    if split is None and not files:  # for example only a test split: unambiguous
        files = found
    if not files:
        what = f" of split {split}" if split and found else ""
        raise UserError(f"data source {path}: no file{what} in this folder ends in {', '.join(READERS)}")
    return files


def available_splits(path: str, subset: str | None = None) -> dict[str, str]:
    """The splits of a folder or hub dataset: train, validation, test -> its own name for each."""
    if is_local(path):
        root = Path(path).expanduser()
        if not root.is_dir():
            return {}
        return {name: name for name in {_split_of(file, root) for file in _files_below(root)}}
    import datasets

    try:
        names = datasets.get_dataset_split_names(path, subset)
    except Exception as error:  # the hub client's errors have no common base class
        raise _not_loadable(path, error) from None
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(_SPLITS.get(_first_word(name), name), name)
    return found


def read_file(path: Path) -> Iterator[RawRecord]:
    """Records of one file, read according to its suffix."""
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError:
        raise UserError(
            f"data source {path}: line {_undecodable_line(path)} is not UTF-8; convert the file, for example with "
            "iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise UserError(f"data source {path}: cannot be read ({error})") from None


def read_hub(
    name: str, *, split: str, subset: str | None = None, revision: str | None = None, streaming: bool = False
) -> tuple[Iterator[RawRecord], str, int]:
    """Records of a hub dataset, their fingerprint, and their size in bytes (0: unknown). Raises UserError.

    A streamed dataset cannot be hashed before it is read: its fingerprint is its name and revision.
    """
    import datasets

    try:
        data: Any = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the hub client's errors have no common base class
        raise _not_loadable(name, error) from None
    fingerprint = f"{name}/{subset}/{split}/{revision}" if streaming else data._fingerprint

    def records() -> Iterator[RawRecord]:
        for i, fields in enumerate(data):
            yield RawRecord(plain_value(dict(fields)), f"{name} [{split}], row {i + 1}")

    return records(), fingerprint, 0 if streaming else data.data.nbytes


def _undecodable_line(path: Path) -> int:
    # the decoder reads in chunks and does not know its position in the file
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _not_loadable(name: str, error: Exception) -> UserError:
    return UserError(
        f"data source {name}: neither a local file nor a dataset that can be loaded from the hub "
        f"({type(error).__name__}: {error})"
    )


def _files_below(root: Path) -> list[Path]:
    return sorted(
        file for file in root.rglob("*") if file.is_file() and file.suffix in READERS and not file.name.startswith(".")
    )


def _split_of(file: Path, root: Path) -> str:
    """`train` for train.jsonl, train-00000-of-00002.parquet, train/x.json and files that name no split."""
    for part in reversed(file.relative_to(root).with_suffix("").parts):
        split = _SPLITS.get(_first_word(part))
        if split is not None:
            return split
    return "train"


def _first_word(name: str) -> str:
    return re.split(r"[^a-zA-Z]", name)[0].lower()
