"""Shapes of a family that `memory.families` does not list: the model is built on the meta device and inspected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..model import decoder_layers, is_conv1d, is_linear, load_config, stacked_experts
from ..model.check_config import build_on_meta
from ..model.experts import expert_matrices, linear_shape
from ..model.state_layers import state_mixers
from .shapes import Experts, LayerKind, Linear, ModelShapes, Traced


def measure_shapes(name: str, revision: str | None = None) -> ModelShapes:
    """Exact weight counts, summed over kinds of layers; a layer is assumed to save the input and output of each linear
    layer, and to run its experts as `model.experts` does. Those of families with state are traced (`traced_layer`).

    `unknown` names what is in a layer besides linear layers, experts and vectors: its activations are not planned.
    Raises UserError for what is not a decoder-only causal language model.
    """
    config = load_config(name, revision)
    model: Any = build_on_meta(name, config)
    text: Any = config.get_text_config()
    layers = decoder_layers(model)
    if not layers:
        raise UserError(f"model.name {name}: {type(model).__name__} has no known decoder layers")
    prefix = next(key for key, module in model.named_modules() if module is layers[0]).rpartition(".")[0]
    head = model.get_output_embeddings()
    own = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * len(layers)
    kinds = tuple(_kind(layer, one, head) for layer, one in zip(layers, own, strict=True))
    is_traced = bool(state_mixers(model))
    if is_traced:
        kinds = _traced(name, revision, kinds, getattr(text, "layer_types", None) or ())
    unknown = "" if is_traced else next((found for layer in layers if (found := _unknown(layer))), "")
    total = sum(parameter.numel() for parameter in model.parameters())
    in_layers = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    tables = {id(model.get_input_embeddings().weight), id(head.weight)}
    embedding = model.get_input_embeddings().weight.numel()
    first = kinds[0]
    return ModelShapes(
        family=text.model_type,
        num_layers=len(layers),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        layer_prefix=prefix,
        linears=first.linears,
        norm_weights=first.norm_weights,
        experts=first.experts,
        traced=first.traced,
        layers=kinds if len(set(kinds)) > 1 else (),
        embedding_weights=embedding,
        head_weights=embedding if len(tables) == 2 else 0,
        final_weights=total - in_layers - embedding * len(tables),
        max_positions=getattr(text, "max_position_embeddings", None),
        rotary_dim=first.head_dim,
        is_exact=False,
        unknown=unknown,
    )


def _traced(
    name: str, revision: str | None, kinds: tuple[LayerKind, ...], types: Sequence[str]
) -> tuple[LayerKind, ...]:
    """Each layer's kind with the first layer of that kind, from which its bytes are traced."""
    first: dict[tuple[LayerKind, str], int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault((kind, types[index] if types else ""), index)
    return tuple(
        replace(kind, traced=Traced(name, revision, first[kind, types[index] if types else ""]))
        for index, kind in enumerate(kinds)
    )


def _kind(layer: Any, text: Any, head: Any) -> LayerKind:
    linears = tuple(
        _linear(key, module) for key, module in layer.named_modules() if is_linear(module) and module is not head
    )
    stacks = stacked_experts(layer)
    experts = _experts(layer, text, *next(iter(stacks.items()))) if len(stacks) == 1 else None
    planned = sum(one.num_weights + (one.outputs if one.has_bias else 0) for one in linears)
    planned += 0 if experts is None else experts.num_weights
    heads = text.num_attention_heads
    width = next((module.head_dim for module in layer.modules() if isinstance(getattr(module, "head_dim", 0), int)
                  and hasattr(module, "head_dim")), None)  # fmt: skip
    return LayerKind(
        linears=linears,
        norm_weights=sum(parameter.numel() for parameter in layer.parameters()) - planned,
        experts=experts,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=width or getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def _experts(layer: Any, text: Any, name: str, module: Any) -> Experts:
    num_experts, hidden, inner = linear_shape(*expert_matrices(module)[1])
    counts = (getattr(text, key, None) for key in ("num_experts_per_tok", "moe_k", "moe_top_k", "top_k_experts"))
    top_k = next((count for count in counts if isinstance(count, int)), 1)
    return Experts(name, num_experts, min(top_k, num_experts), hidden, inner)


def _unknown(layer: Any) -> str:
    """What a plan of a layer leaves out: the name of a weight that is neither linear, expert, router nor vector."""
    stacks = stacked_experts(layer)
    for key, parameter in layer.named_parameters():
        owner = key.rpartition(".")[0]
        # sinks: scores are materialized where no kernel passes its check (`model.attention_sinks`)
        if (parameter.ndim > 2 and owner not in stacks) or key.endswith(".sinks"):
            return f"{key} {tuple(parameter.shape)}"
    return "" if len(stacks) <= 1 else f"{len(stacks)} stacks of experts in one layer"


def _linear(name: str, layer: Any) -> Linear:
    outputs, inputs = layer.weight.shape
    if is_conv1d(layer):
        outputs, inputs = inputs, outputs
    return Linear(name, inputs, outputs, layer.bias is not None)
