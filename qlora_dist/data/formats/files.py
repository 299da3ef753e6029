"""Where records come from: files, folders of files, and the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...config.names import is_data_path
from ...errors import UserError, explain_os_error
from .folders import SPLITS, files_by_split, first_word, split_of
from .readers import READERS, RawRecord, plain_value
from .slices import parse_split


def find_files(path: str, split: str | None = None) -> list[Path]:
    """The files of a local source, sorted: those of the split that `split` names (default: train)."""
    root = Path(path).expanduser()
    name = None if split is None else parse_split(path, split).name
    if not root.exists():
        raise UserError(f"data source {path}: no such file or folder (working directory {Path.cwd()})")
    if root.is_file():
        if root.suffix not in READERS:
            raise UserError(
                f"data source {path}: unknown file type {root.suffix or '(no suffix)'}; expected one of "
                f"{', '.join(READERS)}"
            )
        own = split_of(root, root.parent)
        if name is not None and SPLITS.get(name, name) != own:
            raise UserError(
                f"data source {path}: split is {split}, but by its name this file is the split {own}; remove split, or "
                f"choose a part, such as {own}[:90%]"
            )
        return [root]
    if not root.is_dir():
        raise UserError(f"data source {path}: neither a file nor a folder")
    found = files_by_split(root)
    files = found.get(SPLITS.get(name or "train", name or ""), [])
    if split is None and not files:  # for example only a test split: unambiguous
        files = sorted(file for group in found.values() for file in group)
    if not files:
        what = f" of split {name}" if name and found else ""
        raise UserError(f"data source {path}: no file{what} in this folder ends in {', '.join(READERS)}")
    return files


def available_splits(path: str, subset: str | None = None, revision: str | None = None) -> dict[str, str]:
    """The splits of a folder or hub dataset: train, validation, test -> its own name for each."""
    if is_data_path(path):
        root = Path(path).expanduser()
        return {name: name for name in files_by_split(root)} if root.is_dir() else {}
    import datasets

    try:
        names = datasets.get_dataset_split_names(path, subset, revision=revision)
    except Exception as error:  # the hub client's errors have no common base class
        raise _not_loadable(path, error) from None
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(SPLITS.get(first_word(name), name), name)
    return found


def read_file(path: Path) -> Iterator[RawRecord]:
    """Records of one file, read according to its suffix. Raises UserError or MachineFailed with its name."""
    try:
        if path.suffix not in (".parquet", ".arrow"):
            _refuse_utf16(path)
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError:
        raise UserError(
            f"data source {path}: line {_undecodable_line(path)} is not UTF-8; convert the file, for example with "
            "iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise explain_os_error(f"reading data source {path}", error) from error


def read_hub(
    name: str, *, split: str, subset: str | None = None, revision: str | None = None, streaming: bool = False
) -> tuple[Iterator[RawRecord], str, int]:
    """Records of a hub dataset, their fingerprint, and their size in bytes (0: unknown). Raises UserError.

    A streamed dataset cannot be hashed before it is read: its fingerprint is its name and commit, and that commit is
    read. Where the commit cannot be had, its name and revision.
    """
    import datasets

    if streaming:
        revision = _commit(name, revision) or revision
    try:
        data: Any = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the hub client's errors have no common base class
        raise _not_loadable(name, error) from None
    fingerprint = f"{name}/{subset}/{split}/{revision}" if streaming else data._fingerprint

    def records() -> Iterator[RawRecord]:
        number = 0
        try:
            for fields in data:
                number += 1
                yield RawRecord(plain_value(dict(fields)), f"{name} [{split}], row {number}")
        except OSError as error:
            raise explain_os_error(f"reading data source {name} [{split}] after row {number}", error) from error
        except Exception as error:  # a damaged file, a type that cannot be decoded: no common base class
            raise UserError(
                f"data source {name} [{split}]: cannot be read after row {number} ({type(error).__name__}: {error})"
            ) from error

    return records(), fingerprint, 0 if streaming else data.data.nbytes


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a hub dataset means now; None where the hub cannot be asked."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=30).sha
    except Exception:  # the hub client's errors have no common base class
        return None


def _refuse_utf16(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(2)
    if head in (b"\xff\xfe", b"\xfe\xff") or (len(head) == 2 and 0 in head and any(head)):
        raise UserError(f"data source {path}: the file is UTF-16, expected UTF-8; convert it: iconv -f utf-16 -t utf-8")


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
