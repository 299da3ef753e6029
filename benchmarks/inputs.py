"""What cells read, created once per run: model folders, tokenized data, the documents of steps, initial adapters. Also
the package's memory plan of a cell."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qlora_dist.config import ModelConfig
from qlora_dist.errors import UserError

from .cells import Cell
from .dataset import documents_of_steps, write_dataset, write_tokenizer
from .shapes import DRAWN, config_json, shape_of, write_model


def prepare(cell: Cell, scratch: Path, num_steps: int) -> dict[str, Any]:
    """Folders and lists for a worker's spec. Reuses what an earlier cell created."""
    if cell.engine == "gemm":
        return {"model": "", "data": "", "initial": ""}
    model, data = _folders(cell, scratch)
    shape = shape_of(cell.shape, cell.layers)
    if not (model / "tokenizer.json").exists():
        if _fits_on_disk(cell, scratch) is None:
            write_model(model, shape)
        else:
            model.mkdir(parents=True, exist_ok=True)
            (model / "config.json").write_text(json.dumps(config_json(shape)))
            (model / DRAWN).touch()
        write_tokenizer(model, shape.vocabulary)
    write_dataset(data, model, kind=cell.data, row_tokens=cell.row_tokens, vocabulary=shape.vocabulary)
    prepared: dict[str, Any] = {"model": str(model), "data": str(data), "initial": ""}
    if cell.engine == "ours":
        return prepared
    if not cell.is_full:
        prepared["initial"] = str(_initial_adapter(cell, model, scratch))
    return prepared | {"document_steps": _document_steps(cell, model, data, scratch, num_steps)}


def too_large(cell: Cell, scratch: Path) -> str | None:
    """Why the cell's weights do not fit on this machine's disk; None if they do or need not."""
    if cell.engine == "gemm":
        return None
    reason = _fits_on_disk(cell, scratch)
    if reason is None or (cell.engine == "ours" and "weights" in ModelConfig.model_fields):
        return None
    return reason


def _fits_on_disk(cell: Cell, scratch: Path) -> str | None:
    """None if the shape's 16-bit weights fit on the disk, or how large they are and how much is free."""
    if (_folders(cell, scratch)[0] / "model.safetensors.index.json").exists():
        return None
    needed = 2 * shape_of(cell.shape, cell.layers).parameters
    free = shutil.disk_usage(scratch).free
    if needed < 0.8 * free:
        return None
    return f"its 16-bit weights take {needed / 2**30:.0f} GiB on disk, {free / 2**30:.0f} GiB are free"


def facts_of(cell: Cell, scratch: Path) -> dict[str, Any] | None:
    """Facts about a cell's data."""
    if cell.engine == "gemm":
        return None
    path = _folders(cell, scratch)[1] / "facts.json"
    return json.loads(path.read_text()) if path.exists() else None


def planned(cell: Cell, scratch: Path) -> dict[str, Any] | None:
    """The memory plan of a cell as JSON; None if it cannot be planned. Only for this package's cells."""
    if cell.engine != "ours":
        return None
    try:
        memory = importlib.import_module("qlora_dist.memory")
    except ImportError:
        return None
    from .ours import config_of

    model, data = _folders(cell, scratch)
    shapes = memory.shapes_from_config(config_json(shape_of(cell.shape, cell.layers)))
    try:
        plan = memory.plan_memory(
            config_of(cell, model, data, scratch),
            shapes,
            world_size=cell.ranks,
            device_bytes=None if cell.cap_gib is None else int(cell.cap_gib * 2**30),
        )
    except UserError as error:  # a refused plan is a result; the measurement continues
        return {"error": str(error)}
    found: dict[str, Any] = plan.to_json()
    return found


def model_folder(cell: Cell, scratch: Path) -> Path:
    """Where `prepare` keeps the cell's model, and finds one that is complete."""
    depth = "" if cell.layers is None else f"-{cell.layers}l"
    return scratch / f"model-{cell.shape}{depth}"


def _folders(cell: Cell, scratch: Path) -> tuple[Path, Path]:
    return model_folder(cell, scratch), scratch / f"data-{cell.shape}-{cell.data}-{cell.row_tokens}"


def _initial_adapter(cell: Cell, model: Path, scratch: Path) -> Path:
    """The adapter weights that this package starts from, for the peers. On a model without storage nothing would be
    initialized, so each linear layer gets a weight with (almost) no storage."""
    path = scratch / f"adapter-{model.name}-r{cell.rank}.safetensors"
    if not path.exists():
        from transformers import AutoConfig, AutoModelForCausalLM

        from qlora_dist.model.lora import attach_lora, trainable_parameters

        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        # PEFT places an adapter on its layer's device: on meta it would have no values, so layers get a stored weight
        for module in base.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(torch.empty(1).expand(module.weight.shape), requires_grad=False)
        adapted = attach_lora(base, rank=cell.rank, alpha=16, seed=0)
        weights = {name: value.detach().contiguous() for name, value in trainable_parameters(adapted).items()}
        save_file(weights, path)
    return path


@lru_cache(maxsize=8)
def _document_steps(cell: Cell, model: Path, data: Path, scratch: Path, num_steps: int) -> list[list[list[int]]]:
    from qlora_dist.data.documents import build_documents
    from qlora_dist.data.loader import Loader
    from qlora_dist.data.packing import pack_best_fit
    from qlora_dist.data.tokenizer import load_tokenizer

    from .ours import config_of

    config = config_of(dataclasses.replace(cell, packing=True, engine="ours", variant=""), model, data, scratch)
    documents = build_documents(
        config.data.train,
        load_tokenizer(str(model)),
        row_tokens=cell.row_tokens,
        cache_dir=config.data.cache_dir,
        num_workers=1,
    )
    rows = pack_best_fit(documents.lengths, cell.row_tokens, config.seed)
    loader = Loader(
        documents, rows, rows_per_step=cell.rows_per_step, micro_rows=cell.micro_rows, rank=0, world_size=1, seed=0
    )
    return documents_of_steps(loader, rows, num_steps)
