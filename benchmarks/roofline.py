"""Predicted time of a training micro-step, ours and stock PEFT's, traced under fake tensors at the roofline of a card.

    python -m benchmarks.roofline --shape 8b --tokens 8192 --json benchmarks/results/traced/roofline-8b.json

No GPU and nothing measured: `qlora_dist.commands.plan.roofline` sees each operation of the real code (forward, loss,
backward) and sums max(FLOPs / rate, bytes / bandwidth, launch floor). Figures per decoder layer are the difference of
two depths divided by the layers between them, so that embedding and loss do not count; whole steps are extrapolated to
the full depth. All methods: NF4 with double quantization, adapters on all linear layers, no dropout, bf16 hidden
states, documents packed without padding, torch's varlen flash attention.

    ours    this package's forward pass and loss
    peft    PEFT's own forward on transformers' layers, fp32 adapters (PEFT's default), transformers' loss, outside of
            torch.autocast; recomputation by transformers' `gradient_checkpointing_enable`, non-reentrant
    trl     the same with TRL's types: adapters in bf16. TRL's code does not run here: it is stock PEFT with its types
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from qlora_dist.commands.plan.launches import KINDS
from qlora_dist.commands.plan.roofline import RATES, Rates, Roofline, Sums, trace_micro_step
from qlora_dist.commands.plan.simulate import full_rows
from qlora_dist.config import parse_config
from qlora_dist.errors import UserError
from qlora_dist.memory import plan_memory, shapes_from_config
from qlora_dist.memory.live_bytes import LiveBytes, create_tables
from qlora_dist.model.attention import documents_of
from qlora_dist.model.meta import empty_base, fill_empty

from . import provenance
from .peers import TARGETS
from .shapes import MAX_POSITIONS, Shape, config_json, shape_of

SHAPES = ("1b", "8b", "13b", "65b", "70b")
RECIPES = {
    "ours": "this package",
    "peft": "stock PEFT, fp32 adapters, without torch.autocast",
    "trl": "stock PEFT with TRL's types (bf16 adapters)",
}
RECOMPUTE = ("none", "full")
DEPTHS = (2, 4)  # the first layer differs (its input needs no gradient), every further one is like the others
TEXT = (
    "Traced under fake tensors, predicted, not measured: the operations of the real code, each at max(FLOPs / rate, "
    "bytes / bandwidth, launch floor) with the rates of the raw file. Kernels are launches of forward and backward. "
    "Per decoder layer, by the difference of two depths; a whole micro-step (with the loss, without the update) is "
    "extrapolated to the full depth. Peers are PEFT's forward and transformers' layers and loss with this package's "
    "call of attention, not TRL's or Trainer's loop (no torch.autocast)."
)


def run(
    shape: Shape, *, tokens: int, document: int, rank: int, rates: Rates, methods: list[str]
) -> list[dict[str, Any]]:
    """One cell per method and level of recomputation. Raises UserError if documents do not divide the tokens."""
    if document < 1 or tokens % document:
        raise UserError(f"--tokens {tokens} is no multiple of --document {document}; give whole documents")
    if document > MAX_POSITIONS:
        raise UserError(f"--document is {document}; expected at most the model's {MAX_POSITIONS} positions")
    found = []
    for method in methods:
        for recompute in RECOMPUTE:
            trace = _trace_ours if method == "ours" else _trace_peer
            shallow, deep = (
                trace(method, recompute, _config(shape, depth), tokens, document, rank, rates) for depth in DEPTHS
            )
            found.append({"method": method, "recipe": RECIPES[method], "recompute": recompute, "is_predicted": True,
                          **_figures(shallow, deep, shape.layers, tokens)})  # fmt: skip
    return found


# --- traces -----------------------------------------------------------------------------------------------------------


def _config(shape: Shape, layers: int) -> dict[str, Any]:
    """config.json of the shape with its first layers only."""
    return {**config_json(shape), "num_hidden_layers": layers}


def _pretrained(raw: dict[str, Any]) -> Any:
    return AutoConfig.for_model(raw["model_type"], **{name: raw[name] for name in raw if name != "model_type"})


def _trace_ours(
    method: str, recompute: str, raw: dict[str, Any], tokens: int, document: int, rank: int, rates: Rates
) -> Roofline:
    rows = tokens // document
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"name": "unused"},
            "lora": {"rank": rank, "alpha": 16, "dropout": 0.0},
            "data": {"train": [{"path": "unused"}], "row_tokens": document},
            "batch": {"rows_per_step": rows, "micro_rows": rows},
            "optim": {"name": "adamw"},
            "train": {"steps": 1},
        }
    )
    shapes = shapes_from_config(raw)
    assert shapes is not None
    count = raw["num_hidden_layers"] if recompute == "full" else 0
    plan = plan_memory(config, shapes, world_size=1, device_bytes=None, recompute=count, micro_rows=rows)
    roofline, _ = trace_micro_step(config, plan, _pretrained(raw), rates)
    return roofline


def _trace_peer(
    method: str, recompute: str, raw: dict[str, Any], tokens: int, document: int, rank: int, rates: Rates
) -> Roofline:
    create_tables("nf4")
    model = _peer_model(method, recompute, raw, rank)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill_empty(model)
        batch = full_rows(tokens // document, document, LiveBytes())
        with Roofline(rates, batch.lengths) as roofline:
            output = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                labels=batch.input_ids,
                use_cache=False,
                packed=documents_of(batch, "varlen"),
            )
            output.loss.backward()
    return roofline


def _peer_model(method: str, recompute: str, raw: dict[str, Any], rank: int) -> Any:
    base: Any = empty_base(
        _pretrained(raw), quantization="nf4", double_quant=True, compute_dtype=torch.bfloat16, backend="varlen"
    )
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # names that transformers 5.23 deprecates, as PEFT 0.21 and Trainer still use them
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing(_enable)?` is deprecated", FutureWarning)
        model: Any = get_peft_model(base, lora, autocast_adapter_dtype=True)
        if recompute == "full":
            # random states cannot be read under fake tensors; saving them launches nothing
            options = {"use_reentrant": False, "preserve_rng_state": False}
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for name, parameter in model.named_parameters():
        if method == "trl" and "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.train()


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(shallow: Roofline, deep: Roofline, layers: int, tokens: int) -> dict[str, Any]:
    """Per layer, and for the whole depth."""
    count = DEPTHS[1] - DEPTHS[0]
    kinds = {kind: _per_layer(shallow.total(kind), deep.total(kind), count) for kind in KINDS}
    layer = _per_layer(shallow.total(), deep.total(), count)
    whole = shallow.total()
    more = layers - DEPTHS[0]
    seconds = whole.seconds + more * layer["seconds"]
    share = {kind: kinds[kind]["seconds"] / layer["seconds"] for kind in KINDS}
    return {
        "ms_per_layer": 1e3 * layer["seconds"],
        "kernels_per_layer": layer["kernels"],
        "bytes_per_token": layer["num_bytes"] / tokens,
        "flops_per_token": layer["flops"] / tokens,
        "products_share": share["products"],
        "attention_share": share["attention"],
        "dequantization_share": share["dequantization"],
        "memory_bound_share": share["memory-bound"],
        "per_layer_by_kind": kinds,
        "per_layer_by_operation": _by_operation(shallow, deep, count),
        "predicted_step": {
            "layers": layers,
            "ms": 1e3 * seconds,
            "tokens_per_second": tokens / seconds,
            "kernels": whole.kernels + more * layer["kernels"],
            "bytes": whole.num_bytes + more * layer["num_bytes"],
            "flops": whole.flops + more * layer["flops"],
        },
    }


def _per_layer(shallow: Sums, deep: Sums, count: int) -> dict[str, float]:
    return {name: (value - getattr(shallow, name)) / count for name, value in asdict(deep).items()}


def _by_operation(shallow: Roofline, deep: Roofline, count: int) -> list[dict[str, Any]]:
    """The slowest first."""
    found = [
        {"operation": operation, "kind": kind,
         **_per_layer(shallow.operations.get((kind, operation), Sums()), sums, count)}
        for (kind, operation), sums in deep.operations.items()
    ]  # fmt: skip
    return sorted((one for one in found if one["kernels"]), key=lambda one: -one["seconds"])


def _changed(rates: Rates, changes: list[str]) -> Rates:
    """With each NAME=VALUE. Raises UserError for what is no rate."""
    for change in changes:
        name, _, value = change.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"--rate {change!r}: expected NAME=NUMBER, such as bandwidth=2.4e12") from None
        rates = rates.changed(name, number)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--document", type=int, default=2048, help="tokens of each document")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gpu", choices=list(RATES), default="h100")
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=VALUE",
                        help=f"instead of the card's: {', '.join(Rates.__dataclass_fields__)}")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    shape = shape_of(arguments.shape)
    try:
        provenance.require_clean(arguments.allow_dirty)
        rates = _changed(RATES[arguments.gpu], arguments.rate)
        cells = run(shape, tokens=arguments.tokens, document=arguments.document, rank=arguments.rank, rates=rates,
                    methods=arguments.methods)  # fmt: skip
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    content = {
        "benchmark": "roofline",
        "provenance": provenance.collect(provenance.this_command("benchmarks.roofline"), torch.device("cpu")),
        "text": TEXT,
        "shape": arguments.shape,
        "tokens": arguments.tokens,
        "document": arguments.document,
        "rank": arguments.rank,
        "gpu": arguments.gpu,
        "rates": asdict(rates),
        "depths": list(DEPTHS),
        "cells": cells,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    for cell in cells:
        print(
            f"{cell['method']:5} recompute {cell['recompute']}: predicted {cell['ms_per_layer']:6.2f} ms and "
            f"{cell['kernels_per_layer']:.0f} kernels a layer, {cell['predicted_step']['ms']:8.1f} ms a micro-step"
        )


if __name__ == "__main__":
    main()
