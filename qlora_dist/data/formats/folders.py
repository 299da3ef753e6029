"""Folders of data: which files hold records, and of which split. Knows the layouts of `datasets` and of the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...config.json_file import read_json
from ...errors import UserError, explain_os_error, os_errors, shortened
from .readers import READERS

# split names of folders and hub datasets -> the three names used here
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
# about a dataset, not of it
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_COMPRESSED = {".gz", ".zst", ".bz2", ".xz", ".zip"}


def files_by_split(root: Path) -> dict[str, list[Path]]:
    """The data files below a folder, sorted, by split. Raises UserError for what cannot be read."""
    _refuse_several_configurations(root)
    found: dict[str, list[Path]] = {}
    for folder, names in _folders(root):
        for file in _data_files(folder, names):
            found.setdefault(split_of(file, root), []).append(file)
    return {split: sorted(files) for split, files in found.items()}


def split_of(file: Path, root: Path) -> str:
    """`train` for train.jsonl, train-00000-of-00002.parquet, train/x.json and files that name no split."""
    for part in reversed(file.relative_to(root).with_suffix("").parts):
        split = SPLITS.get(first_word(part))
        if split is not None:
            return split
    return "train"


def first_word(name: str) -> str:
    """The split in a name such as train-00000 or validation_v2, if it begins with one."""
    return re.split(r"[^a-zA-Z]", name)[0].lower()


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder with the names of its files; hidden ones (.git, .cache) hold no data."""

    def fail(error: OSError) -> None:
        raise explain_os_error(f"reading data source {root}", error)

    for folder, below, names in os.walk(root, onerror=fail):
        below[:] = [name for name in below if not name.startswith(".")]
        yield Path(folder), [name for name in names if not name.startswith(".")]


def _data_files(folder: Path, names: list[str]) -> list[Path]:
    if "state.json" in names and "dataset_info.json" in names:
        return _saved_files(folder)
    if "dataset_info.json" in names:
        _refuse_llama_factory(folder)
    files = [folder / name for name in names if Path(name).suffix in READERS and name not in _ABOUT]
    for file in files:
        if not file.is_file():
            raise UserError(f"data source {file}: not a readable file (a broken link?); repair or remove it")
    packed = [name for name in names if Path(name).suffix in _COMPRESSED and Path(Path(name).stem).suffix in READERS]
    if packed:
        raise UserError(f"data source {folder / packed[0]}: compressed files are not read; unpack it, or move it away")
    return files


def _saved_files(folder: Path) -> list[Path]:
    """The files of a dataset that `save_to_disk` wrote; others beside them are caches of `datasets`."""
    state = _json_of(folder / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    found = [file.get("filename") for file in listed if isinstance(file, dict)] if isinstance(listed, list) else []
    names = [name for name in found if isinstance(name, str) and Path(name).name == name]
    if not names or len(names) < len(found):
        raise UserError(f"data source {folder}: its state.json lists no data files; write it with save_to_disk again")
    if isinstance(state, dict) and state.get("_indices_files"):
        raise UserError(f"data source {folder}: saved with indices, by an old datasets; write it as parquet")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"data source {folder}: {shortened(missing[0])}, which its state.json lists, is missing")
    return [folder / name for name in names]


def _refuse_llama_factory(folder: Path) -> None:
    about = _json_of(folder / "dataset_info.json")
    entries = about.items() if isinstance(about, dict) else ()
    files = {name: entry["file_name"] for name, entry in entries if isinstance(entry, dict) and "file_name" in entry}
    if files:
        some = ", ".join(f"{name} = {file}" for name, file in list(files.items())[:5])
        raise UserError(
            f"data source {folder}: a folder of LLaMA-Factory, whose dataset_info.json names several datasets "
            f"({some}); give the path of one file, its format (alpaca or sharegpt), and its columns if they are renamed"
        )


def _refuse_several_configurations(root: Path) -> None:
    """A clone of a hub dataset lists its configurations at the head of its README; they are not one dataset."""
    card = root / "README.md"
    if not card.is_file():
        return
    with os_errors(f"reading {card}"):
        text = card.read_text(encoding="utf-8", errors="replace")
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    configs = head.partition("\nconfigs:")[2]
    names = re.findall(r"^\s*- config_name:\s*(\S+)", configs, re.MULTILINE)
    if len(names) > 1:
        raise UserError(
            f"data source {root}: its README.md lists several configurations ({shortened(', '.join(names))}); give the "
            "path of the folder or file of one"
        )


def _json_of(path: Path) -> Any:
    return read_json(path, f"{path}:", "repair it, or move it away if the folder is none of `datasets`")
