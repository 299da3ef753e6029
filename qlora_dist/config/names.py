"""Resolves names in the config: what is a local path, a model's folder, the linear layers that get adapters. Does not
import torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..errors import UserError

AdaptedExperts = Literal["none", "shared", "all"]  # of a mixture
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
MODEL_FOLDER = (
    "expected the folder of a model in Hugging Face's form, with config.json and 16-bit safetensors. A GGUF file was "
    "quantized for llama.cpp: give the model that it was made from"
)
_PATH_STARTS = (".", "/", "~")


def is_model_path(name: str) -> bool:
    """Whether `model.name` is a local path: it exists, or has the form of no name on the hub."""
    return name.startswith(_PATH_STARTS) or name.count("/") > 1 or os.path.exists(name)


def is_data_path(name: str) -> bool:
    """Whether the path of a source is local, not the name of a hub dataset: it exists, or has the form of no such
    name."""
    return name.startswith(_PATH_STARTS) or name.endswith(DATA_SUFFIXES) or os.path.exists(name)


def is_template_path(name: str) -> bool:
    """Whether `data.template` is a file, not one of the named templates."""
    return name.endswith(".jinja")


def model_folder(name: str) -> Path | None:
    """The folder that `model.name` refers to; None for the name of a hub model.

    Raises UserError if the name can only be a path and no such folder exists.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"model.name {name}: this is a file; {MODEL_FOLDER}")
    if is_model_path(name):
        raise UserError(f"model.name {name}: there is no such folder (looked in {folder.resolve()})")
    return None


# What PEFT 0.21, by which adapters are saved and loaded everywhere, does not adapt, by model_type: projections that
# Mamba's fused kernels read directly, and shared experts, whose names it takes for those of stacked ones.
NOT_FOR_PEFT = {
    "falcon_h1": ("out_proj",),
    "nemotron_h": ("out_proj",),
    "qwen3_next": ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
}


def resolve_targets(linear_names: Sequence[str], target_modules: str | Sequence[str], family: str = "") -> list[str]:
    """Full names of the linear layers that get adapters: all that PEFT adapts in this family (model_type), or those
    that equal or end in a requested name.

    Raises UserError listing the names that matched nothing and the available ones.
    """
    refused = [name for name in linear_names if _ends_in(name, NOT_FOR_PEFT.get(family, ()))]
    if target_modules == "all-linear":
        return [name for name in linear_names if name not in refused]
    requested = (target_modules,) if isinstance(target_modules, str) else target_modules
    matches = {one: [name for name in linear_names if _ends_in(name, (one,))] for one in requested}
    missing = [one for one, found in matches.items() if not found]
    if missing or not requested:
        available = sorted({name.rsplit(".", 1)[-1] for name in linear_names})
        raise UserError(
            f"lora.target_modules: {', '.join(missing) or 'an empty list'} matches no linear layer; available: "
            f"{', '.join(available)}, or all-linear (the output head and embeddings are never adapted)"
        )
    chosen = {name for found in matches.values() for name in found}
    if both := [name for name in refused if name in chosen]:
        raise UserError(
            f"lora.target_modules selects {both[0]} ({len(both)} such layers), which PEFT does not adapt in {family}; "
            "name the others, or set all-linear, which leaves these out"
        )
    return [name for name in linear_names if name in chosen]


def _ends_in(name: str, endings: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{one}") for one in endings)


def adapted_names(
    linear_names: Sequence[str], target_modules: str | Sequence[str], experts: AdaptedExperts, family: str = ""
) -> list[str]:
    """That, under `lora.experts` none without the linear layers of shared experts. Raises UserError if none is left."""
    chosen = resolve_targets(linear_names, target_modules, family)
    if experts != "none":
        return chosen
    outside = [name for name in chosen if re.search(r"\bshared_(expert|mlp)", name) is None]
    if not outside:
        raise UserError("lora.experts is none, but lora.target_modules selects nothing but shared experts")
    return outside
