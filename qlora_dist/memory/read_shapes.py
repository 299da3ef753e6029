"""Reads a model's shapes: config.json from a folder, the hub's cache, or the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..cluster.launcher import launched_ranks
from ..config.json_file import read_json_object
from ..config.model_json import check_quantization_method, read_model_json
from ..config.names import MODEL_FOLDER, model_folder
from ..console import Console
from ..errors import UserError, shortened
from .families import shapes_from_config
from .shapes import ModelShapes


def read_shapes(name: str, revision: str | None = None) -> ModelShapes:
    """Shapes of a local folder or hub model. Raises UserError.

    Families that are not listed are built on the meta device, which takes seconds instead of milliseconds.
    """
    shapes = shapes_from_config(read_config_json(name, revision))
    if shapes is not None:
        return shapes
    from .measured_shapes import measure_shapes

    return measure_shapes(name, revision)


def read_config_json(name: str, revision: str | None = None) -> dict[str, Any]:
    """config.json as plain data. Raises UserError."""
    config = read_model_json(name, _find(name, revision))
    if config.get("quantization_config") is not None:
        check_quantization_method(name, config["quantization_config"])
    return config


def _what_it_is(folder: Path) -> str:
    """What to do with a folder that is no model's."""
    adapter = folder if (folder / "adapter_config.json").is_file() else folder / "adapter"
    if (adapter / "adapter_config.json").is_file():
        named = read_json_object(adapter / "adapter_config.json", str(adapter)).get("base_model_name_or_path")
        return (
            f"it holds an adapter. Set model.name to the adapter's base ({shortened(named)[1:-1]}), and lora.init_from "
            f"to {adapter} to train it further; or merge it first (qlora-dist merge)"
        )
    return MODEL_FOLDER


def _find(name: str, revision: str | None) -> Path:
    folder = model_folder(name)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name {name}: the folder has no config.json; {_what_it_is(folder)}")
        return folder / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    is_main = launched_ranks().rank == 0
    try:
        # without a network the hub's client tries again for half a minute
        with Console(is_main, sys.stderr) as console, console.watched(lambda: f"asking the hub for {name}"):
            return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # many kinds: network, gated repository, unknown name, offline mode
        if HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set"
            advice = f"download it where there is a network (hf download {name})"
        else:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            advice = "check the name and the network, and log in (hf auth login) if it asks for a licence"
        raise UserError(
            f"model.name {name}: config.json is not in the hub's cache and could not be downloaded ({reason}); {advice}"
            ", or give the folder of a model"
        ) from None
