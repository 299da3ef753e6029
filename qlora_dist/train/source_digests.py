"""What stands behind the paths of a config: digests of the base, of lora.init_from, of a DeepSpeed file.

A checkpoint keeps them, so that a resume notices other content behind the same name. They are of files, not of what is
in memory: independent of strategy, number of ranks and device. (Data, tokenizer and template are in the data's
fingerprint.) Rank 0 only.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ..config import RunConfig
from ..config.json_file import read_json_object
from ..config.names import model_folder
from ..errors import UserError, os_errors
from ..model.lora_files import CONFIG, WEIGHTS
from ..model.weights.safetensors_files import file_digest
from ..model.weights.sources import open_files
from ..optim.deepspeed_config import find_ds_config

DS_CONFIG = "strategy.ds_config "  # and the file's path
UNREAD = ("transformers_version", "_name_or_path")  # keys of config.json that decide nothing

Digests = dict[str, dict[str, str]]  # field of the config -> file -> digest


def source_digests(config: RunConfig) -> Digests:
    """Digests of all files that decide a run and are named by a path. Raises MachineFailed or UserError."""
    lora, strategy = config.lora, config.strategy
    with os_errors("the files of this run could not be read"):
        found = {"model.name": _base(config)}
        if lora is not None and lora.init_from is not None:
            folder = Path(lora.init_from).expanduser()
            if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
                raise UserError(
                    f"lora.init_from {folder}: there is no file {missing[0]}; give the folder of a PEFT adapter"
                )
            found["lora.init_from"] = {name: file_digest(folder / name) for name in (CONFIG, WEIGHTS)}
        if strategy.ds_config is not None:  # by its path: another strategy may be chosen for a resume
            path = find_ds_config(strategy.name, strategy.ds_config)
            found[f"{DS_CONFIG}{strategy.ds_config}"] = {path.name: file_digest(path)}
        return found


def changed_sources(saved: Digests, now: Digests) -> list[str]:
    """One line per field behind which there is other content, naming its files. Fields that only one has are not
    compared: versions before did not record them."""
    lines, before = [], {_of_file(field): digests for field, digests in saved.items()}
    for field, new in sorted(now.items()):
        old = before.get(_of_file(field), new)
        if names := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"  {field}: other content in {', '.join(names[:4])}{more}")
    return lines


def _of_file(field: str) -> str:
    """A field that holds a path, under the name of its file: versions before recorded paths as they were given."""
    given = field.removeprefix(DS_CONFIG)
    return field if given == field else DS_CONFIG + os.path.realpath(os.path.expanduser(given))


def _base(config: RunConfig) -> dict[str, str]:
    settings = config.model
    paths = open_files(settings.name, settings.revision).paths if settings.weights == "files" else ()
    folder = model_folder(settings.name) or (paths[0].parent if paths else None)
    described = {} if folder is None else {"config.json": _config_digest(settings.name, folder / "config.json")}
    return described | {path.name: file_digest(path) for path in sorted(set(paths))}


def _config_digest(name: str, path: Path) -> str:
    content = read_json_object(path, f"model.name {name}: {path}")
    kept = {key: value for key, value in content.items() if key not in UNREAD}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
