"""A family's row: a cell for each proof, or why the family is refused. A cell is

yes                 the proof was run and holds
no: REASON          the program refuses, in its own words
FAILED: REASON      the program accepts and is wrong, or breaks: no such cell may stay (tests/test_docs/test_support)
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from qlora_dist.errors import UserError
from qlora_dist.memory.read_shapes import read_shapes
from qlora_dist.model import check_blocks, check_config, check_head

from .configs import is_wrapper, tiny_config
from .proofs import PROOFS, Subject, silence

YES = "yes"


def row_of(family: str, only: list[str] | None = None) -> dict[str, Any]:
    """What is proven of a family: its kind and a cell for each proof; or why it is refused."""
    with tempfile.TemporaryDirectory() as folder, silence():
        if (reason := refusal(family, Path(folder))) is not None:
            return {"refused": reason}
        one = Subject(family, Path(folder))
        try:
            _begin(one)
        except UserError as error:
            return {"refused": _in_general(str(error), one.folder)}
        except Exception as error:
            return {"kind": "dense", "cells": {"plan": _failed(error, one)}}
        return {"kind": _kind(one), "cells": {name: _cell(PROOFS[name], one) for name in only or PROOFS}}


def refusal(family: str, folder: Path) -> str | None:
    """Why the program refuses the family's config, before any weight is read; None if it accepts."""
    try:
        config = tiny_config(family)
    except Exception as error:  # a family's own checks of sizes that do not agree
        try:
            config = CONFIG_MAPPING[family]()
        except Exception:
            return f"no config of it can be built from defaults: {_first_line(error)}"
    (folder / "config").mkdir()
    config.save_pretrained(folder / "config")
    save_file({"x": torch.zeros(1)}, folder / "config/model.safetensors")  # the weights are not inspected
    try:
        check_config(str(folder / "config"))
    except UserError as error:
        return _in_general(str(error), folder)
    return None


def _begin(one: Subject) -> None:
    """What every run does before its first step, also in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = one.base("nf4", dtype=dtype)
        check_head(model)
        check_blocks(one.adapted(model))
    read_shapes(one.name)


def _kind(one: Subject) -> str:
    if is_wrapper(one.family):
        return "wrapper"
    try:
        return "mixture" if read_shapes(one.name).expert_weights else "dense"
    except UserError:
        return "dense"


def _cell(proof: Callable[[Subject], None], one: Subject) -> str:
    try:
        proof(one)
    except UserError as error:
        return f"no: {_in_general(str(error), one.folder)}"
    except Exception as error:  # whatever breaks is an answer
        return _failed(error, one)
    return YES


def _failed(error: Exception, one: Subject) -> str:
    text = _in_general(_first_line(error), one.folder)
    return f"FAILED: {text if isinstance(error, AssertionError) else f'{type(error).__name__}: {text}'}"


def _in_general(text: str, folder: Path) -> str:
    """Without the temporary folder's name."""
    text = re.sub(rf"model\.name {folder}/\w+: ", "", text)
    return re.sub(rf"{folder}(/\w+)?", "MODEL", text)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if len(lines) > 1 and "Traceback" in str(error) else (lines or [type(error).__name__])[0])[:300]


def as_json(rows: dict[str, Any]) -> str:
    return json.dumps(rows, indent=1, sort_keys=True) + "\n"
