"""`qlora-dist evaluate`: held-out loss of a finished run or adapter, on one process or many."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import adapters
from .. import model as base_model
from ..config import DataConfig, load_config
from ..distributed import World
from ..errors import UserError
from ..evaluate import EvalResult, evaluate
from ..examples import split_sources
from ..generate import Trained, find_trained
from ..loader import eval_batches
from ..loss import nll_sum
from ..packing import Batch
from .stages import build_rows, build_source_documents


def evaluate_trained(
    path: str | Path,
    *,
    config: str | None = None,
    base: str | None = None,
    micro_rows: int = 1,
    with_base: bool = False,
) -> dict[str, EvalResult]:
    """Held-out figures of what was trained, and with `with_base` of the base without it, by name.

    The data are those of the run, or the data section of another `config`. Raises UserError when there are none.
    """
    trained = find_trained(path, base)
    data = _data_of(trained, config, path)
    world = World.init()
    tokenizer = base_model.load_tokenizer(trained.tokenizer_source)
    _, sources = split_sources(data.train, data.eval)
    documents = build_source_documents(data, sources, tokenizer, world, "data.eval", seed=0)
    batches = eval_batches(documents, build_rows(data, documents, 0), micro_rows, world.rank, world.size)

    settings = trained.model
    dtype: torch.dtype = getattr(torch, settings.compute_dtype)
    model: torch.nn.Module = base_model.load_base(
        settings.name,
        revision=settings.revision,
        quantization=settings.quantization if trained.adapter else "none",
        double_quant=settings.double_quant,
        compute_dtype=dtype,
        attention=settings.attention,
        device=world.device,
    )
    base_model.check_head(model)
    head = base_model.output_head(model)

    def batch_nll(batch: Batch) -> torch.Tensor:
        hidden = base_model.hidden_states(model, batch)
        return nll_sum(hidden, head, batch.label_positions, batch.labels)

    results = {}
    if with_base and trained.adapter is not None:
        results["base"] = evaluate(model, batches, batch_nll, world)
    if trained.adapter is not None:
        model = adapters.load_adapters(model, {"trained": trained.adapter})
    results["trained"] = evaluate(model, batches, batch_nll, world)
    world.close()
    return results


def _data_of(trained: Trained, config: str | None, path: str | Path) -> DataConfig:
    data = load_config(config).data if config is not None else trained.data
    if data is None:
        raise UserError(f"{path} is an adapter without its run; name held-out data with --config CONFIG")
    if not split_sources(data.train, data.eval)[1]:
        raise UserError(f"{config or path}: data.eval is empty; name held-out data with --config CONFIG")
    return data
