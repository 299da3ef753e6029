"""Shapes of a family that `memory.families` does not list: the model is built on the meta device and inspected."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..model import decoder_layers, is_conv1d, linear_layers, load_config
from ..model.check_config import build_on_meta
from .shapes import Linear, ModelShapes


def measure_shapes(name: str, revision: str | None = None) -> ModelShapes:
    """Exact weight counts; a layer is assumed to save the input and output of each linear layer.

    Raises UserError for a mixture of experts and for what is not a decoder-only causal language model.
    """
    config = load_config(name, revision)
    model: Any = build_on_meta(name, config)
    text: Any = config.get_text_config()
    layers = decoder_layers(model)
    if not layers:
        raise UserError(f"model.name {name}: {type(model).__name__} has no known decoder layers")
    deep = [key for layer in layers for key, parameter in layer.named_parameters() if parameter.ndim > 2]
    if deep:
        kind = "stacked experts" if "expert" in deep[0] else "weights of more than two dimensions"
        raise UserError(
            f"model.name {name}: {type(model).__name__} has {kind} ({deep[0]}), whose memory cannot be planned yet; "
            "use a dense model"
        )
    prefix = next(key for key, module in model.named_modules() if module is layers[0]).rpartition(".")[0]
    inside = linear_layers(model)
    linears = tuple(
        _linear(key.removeprefix(f"{prefix}.0."), layer)
        for key, layer in inside.items()
        if key.startswith(f"{prefix}.0.")
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    per_layer = sum(parameter.numel() for parameter in layers[0].parameters())
    if sum(parameter.numel() for layer in layers for parameter in layer.parameters()) != per_layer * len(layers):
        raise UserError(
            f"model.name {name}: {type(model).__name__} has layers of different sizes; its memory cannot be planned"
        )
    in_linears = sum(one.num_weights + (one.outputs if one.has_bias else 0) for one in linears)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    embedding = model.get_input_embeddings().weight.numel()
    heads = text.num_attention_heads
    return ModelShapes(
        family=text.model_type,
        num_layers=len(layers),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        layer_prefix=prefix,
        linears=linears,
        norm_weights=per_layer - in_linears,
        embedding_weights=embedding,
        head_weights=embedding if len(tables) == 2 else 0,
        final_weights=total - per_layer * len(layers) - embedding * len(tables),
        rotary_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        is_exact=False,
    )


def _linear(name: str, layer: Any) -> Linear:
    outputs, inputs = layer.weight.shape
    if is_conv1d(layer):
        outputs, inputs = inputs, outputs
    return Linear(name, inputs, outputs, layer.bias is not None)
