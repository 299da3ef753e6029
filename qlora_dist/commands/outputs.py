"""The files and folders that options name: checked before the work is done, which may take hours."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError


def check_output_file(option: str, path: str | Path) -> Path:
    """The path of a file to write; one that is there is replaced, missing folders above it are made when it is written.

    Raises UserError unless that is possible. `option` names it in the error.
    """
    where, target = f"{option} {path}", _expanded(option, path)
    if target.is_dir():
        raise UserError(f"{where}: this is a folder, expected a file to write; name a file in it")
    if os.path.lexists(target) and not target.is_file():
        raise UserError(f"{where}: this is not a regular file; name a new one")
    _check_folder(where, target.parent)
    return target


def check_new_file(option: str, path: str | Path) -> Path:
    """The path of a file to write, which must be absent: what a user may have edited is not replaced. Raises UserError
    as `check_output_file`."""
    target = check_output_file(option, path)
    if os.path.lexists(target):
        raise UserError(f"{option} {path}: exists already, and is not replaced; name a new file, or remove it")
    return target


def check_output_folder(option: str, path: str | Path) -> Path:
    """The path of a folder to write, which is absent or empty. Raises UserError as `check_output_file`."""
    where, target = f"{option} {path}", _expanded(option, path)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{where}: exists and is not empty; name a new folder")
    _check_folder(where, target.parent)
    return target


def check_input_file(option: str, path: str | Path) -> Path:
    """The path of a file to read. Raises UserError if there is none."""
    file = _expanded(option, path)
    if not file.exists():
        raise UserError(f"{option} {path}: there is no such file; name one that exists")
    if file.is_dir():
        raise UserError(f"{option} {path}: this is a folder, expected a file; name one in it")
    return file


def _expanded(option: str, path: str | Path) -> Path:
    try:
        target = Path(path).expanduser()
        os.stat(target)
    except OSError:
        pass
    except (ValueError, RuntimeError) as error:  # a NUL, half a surrogate pair; the home of an unknown user
        raise UserError(f"{option} {path}: not a path ({error})") from None
    return target


def _check_folder(where: str, folder: Path) -> None:
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{where}: {folder} is not a folder; name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{where}: the folder {folder} is not writable; fix its permissions, or name another place")
